#!/usr/bin/env python3
"""Which way of skipping layers reaches a given loss with the least compute, and when does none?

  data    prepare the texts (a minute or two)
  plan    show all runs in order, with their state, time and what they wait for
  run     do what is next; a run that was stopped goes on from its checkpoint, a finished one is a row and never
          runs again
  report  write benchmarks/results/study.md and its plot from the rows

Rows are appended to benchmarks/study/rows.jsonl, which is committed. Runs have the lowest priority and one thread;
they save and wait while --pause-file exists. Protocol: equal training FLOPs (settings.py, plan.py, saving.py).
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.study import data, report, runner, sensitivity
from benchmarks.study.plan import Measure, Plan, Planned, Waiting, seconds
from benchmarks.study.rows import FILE, Results, append_row, read_rows
from benchmarks.study.settings import Spec
from megatron_sbld.exit_status import EXIT_TO_BE_CONTINUED


def main() -> int:
    args = parse_args()
    try:
        return int({"data": prepare, "plan": show_plan, "run": run, "report": write_report}[args.command](args) or 0)
    except ValueError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("data", "plan", "run", "report"))
    shown = "; default: %(default)s"
    parser.add_argument(
        "--text",
        type=Path,
        default=data.DEFAULT_TEXT,
        help="folder with novels to train on, *train.txt, and others to validate on, *valid.txt (also .xz, .gz); "
        "default: ../shared/data beside the repository",
    )
    parser.add_argument("--work", type=Path, default=data.ROOT / "runs" / "study", help="folder of texts and runs")
    parser.add_argument("--rows", type=Path, default=FILE, help="file of the rows" + shown)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of runs, as 'once/w32/staged*'" + shown)
    parser.add_argument("--max-runs", type=int, help="of this call; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time" + shown)
    parser.add_argument("--pause-file", type=Path, help="runs save and wait while it exists")
    args = parser.parse_args()
    args.work, args.rows = args.work.resolve(), args.rows.resolve()
    for name in ("jobs", "max_runs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not allowed: it must be at least 1")
    return args


def prepare(args: argparse.Namespace) -> None:
    os.nice(19)
    data.prepare(args.text, args.work)
    print(f"texts {data.text_id(args.work)} in {args.work}")


def planned(args: argparse.Namespace) -> tuple[list[Planned], set[str]]:
    """The plan as the rows have it now, and the keys of what is done."""
    rows, text = read_rows(args.rows), data.text_id(args.work)
    if text is not None:
        rows = [row for row in rows if row["text"] == text]
    return Plan(Results(rows), sensitivity.known()).all(), {row["key"] for row in rows}


def show_plan(args: argparse.Namespace) -> None:
    items, done = planned(args)
    left, runs = 0.0, 0
    for item in items:
        if isinstance(item, Waiting):
            left += item.seconds
            about = f"{item.count} runs, {item.reason}"
            print(f"waits    {item.name:48} {about:34} {item.seconds / 60:6.1f} min")
        elif isinstance(item, Measure):
            print(f"next     {item.name}")
        else:
            finished = item.key in done
            runs += 1
            left += 0.0 if finished else seconds(item)
            state = "done" if finished else "started" if runner.run_folder(item, args.work).exists() else "next"
            share = f"{item.expected_layers:4.1f} layers, {item.iterations:6,} iterations"
            print(f"{state:8} {item.name:48} {share} {seconds(item) / 60:6.1f} min")
    waiting = sum(item.count for item in items if isinstance(item, Waiting))
    print(f"{runs} runs named, {waiting} more to be decided by rows; about {left / 3600:.1f} core hours are left")


def run(args: argparse.Namespace) -> int:
    """Do what is next until nothing is, `--max-runs` are done or this program is asked to stop."""
    os.nice(19)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    place = runner.Place(args.work, args.pause_file, stop.is_set, lambda text: print(text, flush=True))
    data.prepare(args.text, args.work)
    started, failures = 0, []
    running: dict[Future[dict[str, Any]], Spec] = {}
    failed: set[str] = set()
    with ThreadPoolExecutor(args.jobs) as pool:
        while True:
            room = args.jobs - len(running) if not stop.is_set() else 0
            if args.max_runs is not None:
                room = min(room, args.max_runs - started)
            for spec in next_runs(args, failed | {spec.key for spec in running.values()}, room, place):
                print(f"start {spec.name}, about {seconds(spec) / 60:.1f} min of one core", flush=True)
                running[pool.submit(runner.run, spec, place)] = spec
                started += 1
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                failures += finish(future, running.pop(future), args.rows, failed)
    if stop.is_set():
        return EXIT_TO_BE_CONTINUED
    return 1 if failures else 0


def next_runs(args: argparse.Namespace, excluded: set[str], room: int, place: runner.Place) -> list[Spec]:
    """The first runs of the plan that are neither done nor excluded, at most `room`; measures what they wait for."""
    if room < 1:
        return []
    while True:
        items, done = planned(args)
        open_items = [item for item in items if is_open(item, args.only, done | excluded)]
        measured = next((item for item in open_items[:room] if isinstance(item, Measure)), None)
        if measured is None:
            return [item for item in open_items[:room] if isinstance(item, Spec)]
        place.wait()
        print(f"measure the {measured.name}", flush=True)
        sensitivity.measure(measured.width, args.work)


def is_open(item: Planned, pattern: str, closed: set[str]) -> bool:
    if isinstance(item, Measure):
        return pattern == "*" or "sbld" in pattern
    return isinstance(item, Spec) and item.key not in closed and fnmatch.fnmatch(item.name, pattern)


def finish(future: Future[dict[str, Any]], spec: Spec, rows: Path, failed: set[str]) -> list[str]:
    """Append the row of a run that has ended; what failed is told and left for another call."""
    try:
        row = future.result()
    except runner.StoppedError:
        print(f"stopped {spec.name}; `run` goes on with it", flush=True)
        failed.add(spec.key)
        return []
    except runner.StudyError as error:
        print(f"failed: {error}", file=sys.stderr, flush=True)
        failed.add(spec.key)
        return [spec.name]
    append_row(rows, row)
    print(f"done  {spec.name}: loss {row['loss']} at {row['flops']:.3g} FLOPs, {row['cpu_s'] / 60:.1f} min", flush=True)
    return []


def write_report(args: argparse.Namespace) -> None:
    print(report.write(read_rows(args.rows)))


if __name__ == "__main__":
    sys.exit(main())
