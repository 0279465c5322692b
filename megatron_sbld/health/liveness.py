"""Which rank of a run has died, stalled, failed or hangs: decided from what the ranks last told about themselves.

Pure functions of heartbeats and seconds; the threads that exchange heartbeats are watchdog.py's. Needs the standard
library alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

SAVING = "saving a checkpoint"
"""The activity in which ranks may wait for one that writes for as long as their process group lets them."""

_HEARTBEATS_A_TIMEOUT = 20
_LONGEST_INTERVAL_S = 2.0
_SHOWN_GROUPS = 8


class RankLostError(RuntimeError):
    """Another rank died, stalled or failed; the message names it and the iteration."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Times in seconds that follow from parallel.distributed_timeout_minutes."""

    interval: float
    """Between two heartbeats."""
    patience: float
    """Silence, or waiting, that ends the run: short of the timeout by what it takes to tell all ranks."""
    brief: float
    """Silence that tells which rank has died once another has lost its connection."""
    remark: float
    """Silence that is worth a warning: less than a launcher takes to kill ranks whose neighbour has died."""

    @staticmethod
    def of(timeout_s: float) -> Limits:
        """The limits for a timeout in seconds.

        >>> Limits.of(600.0)
        Limits(interval=2.0, patience=588.0, brief=6.0, remark=10.0)
        """
        interval = min(_LONGEST_INTERVAL_S, timeout_s / _HEARTBEATS_A_TIMEOUT)
        return Limits(interval=interval, patience=timeout_s - 6 * interval, brief=3 * interval, remark=5 * interval)


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a rank tells about itself."""

    beat: int
    """Counts heartbeats: a rank whose number stays the same gives no sign of life."""
    host: str
    iteration: int
    activity: str
    place: str
    """Where the main thread is: file, line and function."""
    waits: bool
    """Whether code at that place waits for other ranks."""
    unchanged_s: float
    """Seconds for which the main thread has been there without any progress."""
    state: Literal["running", "lost", "failed", "ended"] = "running"
    """lost: a collective failed, because another rank is gone. failed: it raised for a reason of its own."""
    error: str = ""
    process: str = ""
    """As local_process.py names it."""
    verdict: str = ""
    """Rank 0's: why the run ends."""
    silent_processes: tuple[str, ...] = ()
    """Beside the verdict: what gave no sign of life, and may be stopped."""

    def encode(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def decode(text: str | bytes) -> Heartbeat:
        """What `encode` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return Heartbeat(**{**fields, "silent_processes": tuple(fields["silent_processes"])})


@dataclass(frozen=True)
class Sighting:
    """A rank as another sees it."""

    heartbeat: Heartbeat | None
    """Its last one; None if it has not given any."""
    silent_s: float
    """Seconds since a new one came, or since the observer began."""


def find_lost(sightings: Mapping[int, Sighting], limits: Limits) -> str | None:
    """Say which rank gives no sign of life or has failed, if one has."""
    return _find_silent(sightings, limits) or _find_failed(sightings, limits)


def silent_ranks(sightings: Mapping[int, Sighting], limits: Limits) -> list[int]:
    """The ranks that give no sign of life, for longer than the run bears: dead or stopped."""
    some_lost = any(seen.heartbeat is not None and seen.heartbeat.state == "lost" for seen in sightings.values())
    limit = limits.brief if some_lost else limits.patience
    return [
        rank
        for rank, seen in sightings.items()
        if seen.silent_s >= limit and (seen.heartbeat is None or seen.heartbeat.state in ("running", "lost"))
    ]


def remarks(sightings: Mapping[int, Sighting], limits: Limits) -> dict[int, str]:
    """What to warn of before it ends the run: by rank, a silence that may yet pass."""
    return {
        rank: f"rank {rank} ({seen.heartbeat.host}) has given no sign of life for {seen.silent_s:.0f} s, last seen in "
        f"{_where(seen.heartbeat)}; after {limits.patience:.0f} s the run ends"
        for rank, seen in sightings.items()
        if seen.heartbeat is not None and seen.heartbeat.state == "running" and seen.silent_s >= limits.remark
    }


def find_hanging(sightings: Mapping[int, Sighting], limits: Limits) -> str | None:
    """Say which ranks the others wait for in vain.

    Nothing is found before one rank has waited for `patience` at one place, or its collective has failed, as with gloo
    after the same time: a phase in which all ranks work may take any time. Ranks that do not wait then are what it
    waits for; if all wait, those that are behind.

    Args:
        sightings: all ranks.
        limits: of the run.
    """
    beats = {rank: seen.heartbeat for rank, seen in sightings.items() if seen.heartbeat is not None}
    longest = max((beat.unchanged_s for beat in beats.values() if _waits(beat)), default=0.0)
    busy = [rank for rank, beat in beats.items() if beat.state == "running" and not beat.waits]
    if longest < limits.patience:
        # Half of it, because of ranks that were at work when another died.
        busy = [rank for rank in busy if beats[rank].unchanged_s >= limits.patience / 2]
        if not busy or not any(beat.state == "lost" for beat in beats.values()):
            return None
    furthest = max(beat.iteration for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.state == "running" and beat.iteration < furthest]
    suspects = busy or behind
    if not suspects:
        if any(sightings[rank].silent_s >= limits.brief for rank in beats if beats[rank].state == "running"):
            return None  # stopped while it waited, maybe: then find_lost is about to name it
        return (
            f"all ranks wait for one another in iteration {furthest}, for {longest:.0f} s and more: "
            f"{_describe(beats, beats)}"
        )
    verb, iteration = "hangs" if len(suspects) == 1 else "hang", beats[suspects[0]].iteration
    return (
        f"{_names(suspects)} ({_hosts(beats, suspects)}) {verb} in iteration {iteration}, and other ranks are "
        f"waiting: {_describe(beats, beats)}"
    )


def _waits(beat: Heartbeat) -> bool:
    return beat.state == "running" and beat.waits and beat.activity != SAVING


def _find_silent(sightings: Mapping[int, Sighting], limits: Limits) -> str | None:
    silent = silent_ranks(sightings, limits)
    beats = {rank: seen.heartbeat for rank, seen in sightings.items() if seen.heartbeat is not None}
    if not silent:
        return None
    seconds = min(sightings[rank].silent_s for rank in silent)
    # A heartbeat may be some short iterations old; those that now wait for the rank know better.
    iteration = max((beat.iteration for beat in beats.values()), default=0)
    last = [f"last seen in {_where(beats[rank])}" if rank in beats else "never seen" for rank in silent]
    return (
        f"{_names(silent)} ({_hosts(beats, silent)}) died or was stopped in iteration {iteration}: no sign of life for "
        f"{seconds:.0f} s, {'; '.join(list(dict.fromkeys(last))[:_SHOWN_GROUPS])}; "
        f"{_describe(beats, [rank for rank in beats if rank not in silent])}"
    )


def _find_failed(sightings: Mapping[int, Sighting], limits: Limits) -> str | None:
    """Ranks that failed on their own while others, which do not know of it, go on waiting."""
    beats = {rank: seen.heartbeat for rank, seen in sightings.items() if seen.heartbeat is not None}
    failed = [
        rank
        for rank, beat in beats.items()
        if beat.state == "failed" and beat.unchanged_s + sightings[rank].silent_s >= limits.brief
    ]
    others = [rank for rank, beat in beats.items() if beat.state in ("running", "lost")]
    if not failed or not others:
        return None
    first = beats[failed[0]]
    return (
        f"{_names(failed)} ({_hosts(beats, failed)}) failed in iteration {first.iteration}: {first.error}; "
        f"{_describe(beats, others)}"
    )


def _names(ranks: Iterable[int]) -> str:
    """Ranks as text, runs of them shortened.

    >>> _names([0, 1, 2, 7])
    'ranks 0-2, 7'
    """
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank {text}" if len(spans) == 1 and spans[0][0] == spans[0][1] else f"ranks {text}"


def _hosts(beats: Mapping[int, Heartbeat], ranks: Iterable[int]) -> str:
    hosts = dict.fromkeys(beats[rank].host for rank in ranks if rank in beats)
    shown = list(hosts)[:_SHOWN_GROUPS] + ["..."] * (len(hosts) > _SHOWN_GROUPS)
    return ", ".join(shown) or "host not known"


def _where(beat: Heartbeat) -> str:
    if beat.state in ("lost", "failed"):
        return f"iteration {beat.iteration}, where it failed with {beat.error}"
    return f"iteration {beat.iteration} ({beat.activity}, {beat.place})"


def _describe(beats: Mapping[int, Heartbeat], ranks: Iterable[int]) -> str:
    """What ranks do, those that do the same together."""
    groups: dict[str, list[int]] = {}
    for rank in ranks:
        groups.setdefault(_where(beats[rank]), []).append(rank)
    largest_last = sorted(groups.items(), key=lambda item: len(item[1]))
    texts = [f"{_names(members)} in {where}" for where, members in largest_last[:_SHOWN_GROUPS]]
    return "; ".join(texts + ["..."] * (len(groups) > _SHOWN_GROUPS)) or "nothing is known about other ranks"
