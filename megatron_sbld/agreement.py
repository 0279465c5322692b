"""Agreement between ranks: each compares the decisions that it drew for a window of iterations with the others'.

Every rank draws by itself. What can go wrong is that ranks were given different settings; then tensor-parallel
collectives would pair wrongly and others hang. So the ranks exchange one small record for each window, and a rank that
differs from rank 0 is named in an error on every rank, before it can hang.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

_DIGEST_BYTES = 16


class DropDisagreementError(RuntimeError):
    """Ranks drew different decisions; the message names them. Raised on every rank."""


class Settings(NamedTuple):
    """The integers of a record; num_samples is 0 unless granularity is `sample`."""

    iteration: int
    num_microbatches: int
    num_samples: int
    num_layers: int
    seed: int


def record_of_window(
    settings: Settings, choices: str, keep_probs: Sequence[np.ndarray], counts: Iterable[NDArray[np.int64]]
) -> np.ndarray:
    """A rank's view of a window as bytes: its integers, mean keep probability and a digest of all decisions.

    The digest is of the decisions themselves, so it covers every setting without a list of them. Which samples or
    tokens run a layer follows from how many do, the integers and `choices`. Keep probabilities stay out of it, because
    their last bit may differ between machines: their mean is compared with a tolerance.

    Args:
        settings: of the first iteration.
        choices: what else decides how a layer runs.
        keep_probs: [L] of each iteration.
        counts: samples that run each layer, or 1 and 0 for other granularities, [microbatches, L] of each iteration.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    digest.update(choices.encode())
    for drawn in counts:
        digest.update((drawn.astype("<u4") if settings.num_samples else np.packbits(drawn > 0)).tobytes())
    mean = np.array([sum(float(probs.mean()) for probs in keep_probs) / len(keep_probs)], dtype="<f8")
    return np.frombuffer(np.array(settings, dtype="<i8").tobytes() + mean.tobytes() + digest.digest(), dtype=np.uint8)


def check_agreement(record: np.ndarray, group: dist.ProcessGroup | None) -> None:
    """Compare this rank's record with every other rank's. Collective.

    Raises:
        DropDisagreementError: on every rank, naming each that differs from rank 0 and in what.
    """
    backend = dist.get_backend(group)
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
    mine = torch.from_numpy(record.copy()).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    _raise_on_disagreement(torch.stack(everyone).cpu().numpy())


class AgreedWindow:
    """The iterations whose decisions all ranks have compared: `length` at a time, none at first."""

    def __init__(self, length: int, group: dist.ProcessGroup | None) -> None:
        self.length = length
        self.group = group
        self.forget()

    def forget(self) -> None:
        """What decides has changed: the next iteration is compared anew."""
        self._first, self._end, self._num_microbatches = 0, 0, 0

    def check(self, iteration: int, num_microbatches: int, record: Callable[[int, int], np.ndarray]) -> None:
        """Compare the window from an iteration on, unless it was. Collective if several ranks run.

        Args:
            iteration: that is about to begin.
            num_microbatches: of it.
            record: makes this rank's record of the window.

        Raises:
            DropDisagreementError: as check_agreement.
        """
        if self._first <= iteration < self._end and num_microbatches == self._num_microbatches:
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1:
            check_agreement(record(iteration, num_microbatches), self.group)
        self._first, self._end, self._num_microbatches = iteration, iteration + self.length, num_microbatches


def _raise_on_disagreement(records: np.ndarray) -> None:
    """Raise on every rank, naming each rank whose record [ranks, bytes] differs from rank 0's and in what."""
    split = 8 * len(Settings._fields)
    integers = np.ascontiguousarray(records[:, :split]).view("<i8")
    means = np.ascontiguousarray(records[:, split : split + 8]).view("<f8")[:, 0]
    digests = records[:, split + 8 :]
    findings = []
    for rank in range(1, len(records)):
        differing = [
            f"{name} {found} instead of {expected}"
            for name, found, expected in zip(Settings._fields, integers[rank], integers[0], strict=True)
            if found != expected
        ]
        if not np.isclose(means[rank], means[0], rtol=1e-9):
            differing.append(f"mean keep probability {means[rank]:.6f} instead of {means[0]:.6f}")
        elif not differing and not np.array_equal(digests[rank], digests[0]):
            differing.append(
                "different decisions at the same mean keep probability (sampler, scope, stages, lists or tokens)"
            )
        if differing:
            findings.append(f"rank {rank}: " + ", ".join(differing))
    if findings:
        raise DropDisagreementError(
            "these ranks would drop different layers than rank 0, because their configuration differs:\n  "
            + "\n  ".join(findings)
        )
