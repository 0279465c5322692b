#!/usr/bin/env python3
"""Trains the same small GPT three times at equal compute, undropped, with SBLD and staged, and compares the runs.

Text is tokenized, each run goes through torchrun with two processes (one where there is one GPU), its model is scored
on held-out text, and a table and plots end it, loss against compute among them. A run that leaves layers out makes as
many more iterations as the undropped run's training FLOPs pay for. The table says nothing of the realised gain: runs of
a minute, one after another, measure what else the machine does. Every call makes a folder of its own, so no run is ever
continued or mixed with an older one.

SBLD takes the sensitivity in configs/quickstart_sensitivity.json; with --measure (`make quickstart PROFILE=1`) that of
this model on this text is measured first. The committed file is what `make quickstart PROFILE=1` measured on the
standard library, as its `measured_with` says.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_sbld.cli.parser import config_parser, parse_config
from megatron_sbld.config.flops import executed_flops
from megatron_sbld.config.sections import Config
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.policy import mean_keep_prob

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
SENSITIVITY = "configs/quickstart_sensitivity.json"
VOCAB_SIZE = 384  # of bytes, as Megatron pads it
SEPARATOR = "<|endoftext|>"  # what `prepare` cuts documents at
STAGES = "[[0.6, 6], [1.0, 24]]"  # a quarter of the layers, then all of them well before the rate decays
RUNS = {
    "undropped": ["--drop.policy", "none"],
    "sbld": ["--drop.policy", "sbld", "--drop.theta", "0.5", "--drop.sensitivity", SENSITIVITY],
    "staged": ["--drop.policy", "staged", "--drop.stages", STAGES],
}
WARMUP, DECAY = 16, 5  # the learning rate rises over a sixteenth of each run, and falls over a fifth
# Of each of the 25 runs that measure the sensitivity: as long as the run warms up, and twice that again. All together
# they cost about as much as eight undropped runs, far above the 5 % of a real run.
MEASURE_ITERS = 50
HELD_OUT_DOCUMENTS = 6  # of at most 16384 bytes: some seconds a run
NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def main() -> None:
    args = parse_args()
    out = make_folder(args.out)
    text = corpus_of_standard_library(out) if args.text is None else args.text.resolve()
    steps = len(RUNS) + (4 if args.measure else 3)
    prefix = out / "data" / "corpus"
    prepare = ["prepare", str(text), "--output", str(prefix), "--max_document_bytes", "16384"]
    run_step(f"1/{steps} tokenize {text}", cli(*prepare))
    first, runs = 2, dict(RUNS)
    if args.measure:
        iters = MEASURE_ITERS if args.iters is None else min(MEASURE_ITERS, args.iters)
        title = f"2/{steps} measure the sensitivity: 25 runs of {iters} iterations"
        run_step(title, measure(prefix, out / "sensitivity", iters, args.iters))
        first, runs["sbld"] = 3, [*RUNS["sbld"][:-1], str(out / "sensitivity" / "sensitivity.json")]
    for number, (name, options) in enumerate(runs.items(), start=first):
        iters = iterations_at_equal_compute(options, args.iters)
        run_step(f"{number}/{steps} train: {name}", pretrain(prefix, out / name, options, iters))
    folders = [str(out / name) for name in RUNS]
    evaluate = ["evaluate", "perplexity", "--data", f"{prefix}_valid", "--limit", str(HELD_OUT_DOCUMENTS)]
    run_step(f"{steps - 1}/{steps} bits per byte of held-out text", cli(*evaluate, "--checkpoint", *folders))
    run_step(f"{steps}/{steps} compare", cli("compare", *folders, "--out", str(out), "--realised", "false"))
    print(f"\nquickstart: the results are in {out}; {out / 'comparison.html'} shows them on one page")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=_path, help="file or folder of text to train on; default: the Python standard library's sources"
    )
    parser.add_argument("--iters", type=int, help=f"iterations of the undropped run; default: as in {CONFIG}")
    parser.add_argument(
        "--measure",
        action="store_true",
        help=f"measure the sensitivity of this model on this text first, in 25 runs of {MEASURE_ITERS} iterations "
        f"(more than the three runs together take), instead of using {SENSITIVITY}",
    )
    parser.add_argument("--out", type=_path, help="folder to make; default: runs/quickstart/<date and time>")
    args = parser.parse_args()
    if args.text is not None and not args.text.exists():
        parser.error(f"--text {args.text} does not exist")
    if args.iters is not None and args.iters < 1:
        parser.error(f"--iters {args.iters} is not allowed: it must be at least 1")
    if args.out is not None and args.out.exists():
        parser.error(f"--out {args.out} exists; name a folder that does not, so that no older run is mixed in")
    return args


def _path(text: str) -> Path:
    return Path(text).expanduser()  # the shell leaves ~ in TEXT=~/file to make


def make_folder(out: Path | None) -> Path:
    """The folder of this call, made anew, relative to the repository where it lies within."""
    folder = (out or ROOT / "runs" / "quickstart" / time.strftime("%Y%m%d-%H%M%S")).resolve()
    folder.mkdir(parents=True)
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder


def corpus_of_standard_library(out: Path) -> Path:
    """Writes the sources of this Python's standard library, in the order of their paths, into one file of documents."""
    corpus = out / "standard_library.txt"
    with (ROOT / corpus).open("w", encoding="utf-8") as stream:
        for source in standard_library_sources():
            stream.write(source.read_text(encoding="utf-8", errors="replace").rstrip("\n") + f"\n{SEPARATOR}\n")
    return corpus


def standard_library_sources() -> Iterator[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for source in sorted(library.rglob("*.py")):
        if NOT_SOURCES.isdisjoint(source.relative_to(library).parts):
            yield source


def iterations_at_equal_compute(options: list[str], iters: int | None) -> int:
    """How many iterations with these options take the training FLOPs of the undropped run, which has `iters`."""
    undropped = parsed(["--drop.policy", "none"] if iters is None else ["--training.train_iters", str(iters)])
    total = undropped.training.train_iters
    if options == RUNS["undropped"]:
        return total
    model, drop = undropped.model, parsed(options).drop
    whole = executed_flops(model, VOCAB_SIZE, 1, model.num_layers)
    length = total
    for _ in range(5):  # what is dropped may depend on the length, but hardly
        policy = build_policy(drop, model.num_layers, length, base_dir=ROOT)
        kept = mean_keep_prob(policy, range(1, length + 1)) * model.num_layers
        length = round(total * whole / executed_flops(model, VOCAB_SIZE, 1, kept))
    return length


def parsed(options: list[str]) -> Config:
    """The config of the runs, with the options over it."""
    return parse_config(config_parser("", ""), ["--config", str(ROOT / CONFIG), *options])[0]


def pretrain(prefix: Path, run_dir: Path, options: list[str], iters: int) -> list[str]:
    """The command that trains one of the runs."""
    command = [*launcher(["pretrain"], prefix, iters), "--logging.run_dir", str(run_dir), *options]
    return [*command, "--data.valid_data_path", json_list(f"{prefix}_valid")]


def measure(prefix: Path, out: Path, iters: int, run_iters: int | None) -> list[str]:
    """The command that measures the sensitivity, for runs of `run_iters`."""
    return [*launcher(["sensitivity", "measure"], prefix, run_iters), "--out", str(out), "--iterations", str(iters)]


def launcher(subcommand: list[str], prefix: Path, iters: int | None) -> list[str]:
    """A command under torchrun, with config, training data, precision and length of the runs."""
    gpus = torch.cuda.device_count()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "1" if gpus == 1 else "2", "-m", "megatron_sbld.cli.main", *subcommand]
    command += ["--config", CONFIG, "--data.train_data_path", json_list(f"{prefix}_train")]
    if gpus:
        command += ["--training.precision", "bf16"]
    if iters is not None:
        command += ["--training.train_iters", str(iters), "--optimizer.lr_warmup_iters", str(iters // WARMUP)]
        command += ["--optimizer.lr_wsd_decay_iters", str(max(iters // DECAY, 1))]
    return command


def cli(*args: str) -> list[str]:
    return [sys.executable, "-m", "megatron_sbld.cli.main", *args]


def json_list(value: Path | str) -> str:
    """A list option of the command line with one element."""
    return json.dumps([str(value)])


def run_step(title: str, command: list[str]) -> None:
    """Shows and runs a command of the repository's root; if it fails, so does the script, with its exit status."""
    print(f"\n=== {title}\n$ {shlex.join(command)}", flush=True)
    # One thread a process: two processes on two cores would otherwise run four threads and wait for each other.
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    if status != 0:
        print(f"\nquickstart: failed with exit status {status}: {shlex.join(command)}", file=sys.stderr)
        sys.exit(status if status > 0 else 128 - status)


if __name__ == "__main__":
    main()
