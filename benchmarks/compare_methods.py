#!/usr/bin/env python3
"""Trains the same GPT with every method of dropping layers, over several seeds, at equal mean keep probability.

    python benchmarks/compare_methods.py --text TRAIN --valid-text VALID --out OUT

The question is whether sensitivity helps: so all methods get the same mean keep probability over layers and iterations,
PLD's at theta 0.5 unless another is given, by the choice of their theta alone (bisection on the policy; no run is
looked at). Methods are those of the paper's Table 6 and a decreasing drop rate that ends in full depth. Before them
`megatron-sbld sensitivity measure` measures it, with the same model and text, on `--profile-seeds` of its own.

With `--data-parallel-size 2 --methods undropped layerdrop-balanced layerdrop-distinct` the question is whether
data-parallel replicas that drop distinct layers train better than ones that share their decisions.

Runs are single processes, or one for each replica under torchrun, `--jobs` runs at a time, and a program that was
stopped goes on where it was: complete runs are not repeated. Afterwards `megatron-sbld evaluate` scores LAMBADA and
WikiText where they are given, and `megatron-sbld compare` makes the table and the plots. Losses are exact; throughput
is worth something only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import yaml
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.common.report import ROOT, command_line
from megatron_sbld.data.documents import DocumentRules, find_files, read_documents
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.policy import mean_keep_prob

SEPARATOR = "<|endoftext|>"
PLD_THETA = 0.5
NO_LISTS = {"block_fraction": 0.0, "allow_fraction": 0.0}
RECOVERY = 0.1
METHODS: dict[str, dict[str, Any]] = {
    "undropped": {"policy": "none"},
    "pld": {"policy": "pld"},
    "layerdrop": {"policy": "layerdrop"},
    # docs/method.md section 4: fewer and fewer drops, full depth at the end, branches scaled by 1 / keep_prob.
    "decreasing-recovery": {
        "policy": "layerdrop",
        "schedule": "linear",
        "theta": 1.0,
        "recovery_fraction": RECOVERY,
        "residual_scale": "inverse_keep_prob",
    },
    "sbld-exponential": {"policy": "sbld", "schedule": "exponential", **NO_LISTS},
    "sbld-pwegd": {"policy": "sbld", **NO_LISTS},
    "sbld-pwegd-lists": {"policy": "sbld"},
    "sbld-pwegd-lists-recovery": {"policy": "sbld", "recovery_fraction": RECOVERY},
    "sbld-dynamic": {"policy": "sbld", "sensitivity_update": "dynamic"},
}
REPLICAS: dict[str, dict[str, Any]] = {
    "layerdrop-balanced": {"policy": "layerdrop", "sampler": "balanced"},
    "layerdrop-distinct": {"policy": "layerdrop", "sampler": "balanced", "replicas": "distinct"},
}
"""For more than one replica: whether it helps that each drops other layers."""
DROP_SECTIONS = METHODS | REPLICAS
MATCHED_FIELDS = {"decreasing-recovery": "start_theta"}
"""What is varied to match the mean keep probability, where it is not theta."""


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = write_config(args)
    prepare_data(args)
    sensitivity = measure_sensitivity(args, config) if needs_sensitivity(args) else None
    drops = match_methods(args, sensitivity)
    (args.out / "methods.json").write_text(json.dumps(drops, indent=2) + "\n")
    commands = {}
    for seed in args.seeds:  # seed by seed, so that a program that is stopped leaves whole comparisons
        for method in args.methods:
            run_dir = args.out / method / f"seed-{seed}"
            commands[f"{method}/seed-{seed}"] = pretrain(args, config, run_dir, seed, drops[method])
    run_all("train", commands, args.jobs, args.out)
    runs = [str(args.out / name) for name in commands]
    run_all("evaluate", evaluate(args, runs), 1, args.out)
    run_all("compare", {"compare": cli("compare", *runs, "--out", str(args.out / "comparison"))}, 1, args.out)
    print((args.out / "comparison" / "comparison.md").read_text())
    print(f"in {args.out / 'comparison'}; the command: {command_line()}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = "; default: %(default)s"
    parser.add_argument("--text", type=Path, required=True, help="text to train on: a file or folder, also .xz and .gz")
    parser.add_argument("--valid-text", type=Path, required=True, help="text to validate on")
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and the comparison")
    parser.add_argument("--lambada", type=Path, help="passages on which all checkpoints are evaluated afterwards")
    parser.add_argument("--wikitext", type=Path, help="WikiText on which the last checkpoints are evaluated afterwards")
    but_replicas = f"default: all but {', '.join(REPLICAS)}"
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=DROP_SECTIONS, help=but_replicas)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of weights, data, decisions" + shown)
    parser.add_argument(
        "--profile-seeds",
        type=int,
        nargs="+",
        default=[101, 102, 103],
        help="of the runs that measure sensitivity" + shown,
    )
    parser.add_argument("--profile-iters", type=int, default=100, help="iterations of such a run" + shown)
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs at a time, a thread for each of their processes" + shown
    )
    parser.add_argument("--data-parallel-size", type=int, default=1, help="replicas, a process each" + shown)
    parser.add_argument("--iters", type=int, default=500, help="iterations of a run" + shown)
    parser.add_argument("--save-interval", type=int, default=0, help="iterations between checkpoints; 0: at the end")
    parser.add_argument(
        "--mean-keep-prob", type=float, help=f"of every method; default: what PLD has at theta {PLD_THETA}"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--vocab-size", type=int, default=8192, help="of the BPE trained on the text" + shown)
    model.add_argument("--num-layers", type=int, default=24, help="transformer layers" + shown)
    model.add_argument("--hidden-size", type=int, default=64, help="width" + shown)
    model.add_argument("--num-attention-heads", type=int, default=4, help="attention heads" + shown)
    model.add_argument("--seq-length", type=int, default=128, help="tokens of a sample" + shown)
    model.add_argument("--batch-size", type=int, default=8, help="samples of an iteration" + shown)
    model.add_argument("--lr", type=float, default=2e-3, help="peak learning rate" + shown)
    model.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    args = parser.parse_args()
    args.out = args.out.resolve()  # runs start in the repository's root
    for name in ("text", "valid_text", "lambada", "wikitext"):
        if getattr(args, name) is not None and not getattr(args, name).exists():
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} does not exist")
    for name in ("jobs", "iters", "profile_iters", "batch_size", "num_layers", "data_parallel_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not allowed: it must be at least 1")
    if args.batch_size % args.data_parallel_size:
        parser.error(
            f"--batch-size {args.batch_size} must be divisible by --data-parallel-size {args.data_parallel_size}"
        )
    for method in args.methods:
        if method in REPLICAS and args.data_parallel_size == 1:
            parser.error(f"--methods {method} is for more than one replica: add --data-parallel-size")
    return args


def needs_sensitivity(args: argparse.Namespace) -> bool:
    return any(DROP_SECTIONS[method]["policy"] == "sbld" for method in args.methods)


def write_config(args: argparse.Namespace) -> Path:
    """The config that all runs share."""
    data = {"tokenizer": str(args.out / "tokenizer.json"), "data_cache_path": str(args.out / "data_cache")}
    data |= {"train_data_path": [f"{args.out}/train_train"], "valid_data_path": [f"{args.out}/valid_train"]}
    config = {
        "model": {
            "num_layers": args.num_layers,
            "hidden_size": args.hidden_size,
            "num_attention_heads": args.num_attention_heads,
            "seq_length": args.seq_length,
            "init_method_std": round(args.hidden_size**-0.5, 3),  # 0.02 is meant for widths of thousands
            "hidden_dropout": 0.0,  # less text is read than there is, so there is nothing to overfit
            "attention_dropout": 0.0,
        },
        "data": data,
        "optimizer": {"lr": args.lr, "min_lr": args.lr / 10, "lr_warmup_iters": max(1, args.iters // 20)},
        "training": {
            "micro_batch_size": args.batch_size // args.data_parallel_size,
            "global_batch_size": args.batch_size,
            "train_iters": args.iters,
            "eval_interval": max(1, args.iters // 10),
            "eval_iters": 30,
            "precision": args.precision,
        },
        "checkpoint": {"save_interval": args.save_interval, "save_at_end": True},
        "logging": {"log_interval": 50, "progress": "lines"},
    }
    path = args.out / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def prepare_data(args: argparse.Namespace) -> None:
    """A byte-level BPE trained on the training text, and both texts in its tokens; left alone where they are there."""
    tokenizer = args.out / "tokenizer.json"
    if not tokenizer.exists():
        backend = tokenizers.ByteLevelBPETokenizer()
        rules = DocumentRules(separator=SEPARATOR)
        texts = (text for path in find_files([str(args.text)], ["*"]).files for text in read_documents(path, rules))
        backend.train_from_iterator(texts, vocab_size=args.vocab_size, special_tokens=[SEPARATOR])
        backend.save(str(tokenizer))
    for name, text in (("train", args.text), ("valid", args.valid_text)):
        if not (args.out / f"{name}.json").exists():
            command = cli("prepare", str(text), "--output", str(args.out / name), "--tokenizer", str(tokenizer))
            run_all(f"tokenize {text}", {f"prepare-{name}": [*command, "--valid_fraction", "0"]}, 1, args.out)


def measure_sensitivity(args: argparse.Namespace, config: Path) -> Path:
    """The paper's procedure over seeds of its own, spread over the jobs by layers."""
    result = args.out / "sensitivity.json"
    if not result.exists():
        shares = np.array_split(np.arange(1, args.num_layers + 1), min(args.jobs, args.num_layers))
        parts = {f"sensitivity-{share[0]}-{share[-1]}": f"{share[0]}-{share[-1]}" for share in shares}
        options = ["--iterations", str(args.profile_iters), "--seeds", ",".join(map(str, args.profile_seeds))]
        options += ["--config", str(config)]
        commands = {
            name: cli("sensitivity", "measure", "--out", str(args.out / name), "--layers", layers, *options)
            for name, layers in parts.items()
        }
        run_all("measure", commands, args.jobs, args.out)
        folders = [str(args.out / name) for name in parts]
        run_all("merge", {"merge": cli("sensitivity", "merge", *folders, "--output", str(result))}, 1, args.out)
    return result


def match_methods(args: argparse.Namespace, sensitivity: Path | None) -> dict[str, dict[str, Any]]:
    """The drop section of each method, its theta chosen for the common mean keep probability."""
    target = args.mean_keep_prob
    if target is None:
        target = mean_of({"policy": "pld", "theta": PLD_THETA}, args)
    drops = {}
    for method in args.methods:
        drop = dict(DROP_SECTIONS[method])
        if drop["policy"] == "sbld":
            drop["sensitivity"] = str(sensitivity)
        if drop["policy"] != "none":
            drop = matched(drop, MATCHED_FIELDS.get(method, "theta"), target, args)
        drops[method] = drop
    return drops


def matched(drop: dict[str, Any], field: str, target: float, args: argparse.Namespace) -> dict[str, Any]:
    """The section with `field` such that its mean keep probability over the run is `target`."""
    low, high = 0.05, 1.0
    if not mean_of({**drop, field: low}, args) <= target <= mean_of({**drop, field: high}, args):
        sys.exit(f"compare_methods.py: error: {drop} cannot have a mean keep probability of {target:.3f}")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of({**drop, field: middle}, args) < target else (low, middle)
    return {**drop, field: round(high, 6)}


def mean_of(drop: dict[str, Any], args: argparse.Namespace) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thetas that the bisection only passes by
        policy = build_policy(DropConfig(**drop), args.num_layers, args.iters)
    return mean_keep_prob(policy, range(1, args.iters + 1))


def pretrain(args: argparse.Namespace, config: Path, run_dir: Path, seed: int, drop: dict[str, Any]) -> list[str]:
    options = {"logging.run_dir": run_dir, "training.seed": seed, "drop.seed": seed}
    options |= {f"drop.{name}": value for name, value in drop.items()}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    launcher = []
    if args.data_parallel_size > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.data_parallel_size)]
    return cli("pretrain", "--config", str(config), *arguments, launcher=launcher)


def evaluate(args: argparse.Namespace, runs: list[str]) -> dict[str, list[str]]:
    commands = {}
    if args.lambada is not None:
        options = ["--data", str(args.lambada), "--every_checkpoint", "--checkpoint", *runs]
        commands["evaluate-lambada"] = cli("evaluate", "lambada", *options)
    if args.wikitext is not None:
        options = ["--data", str(args.wikitext), "--format", "wikitext", "--checkpoint", *runs]
        commands["evaluate-wikitext"] = cli("evaluate", "perplexity", *options)
    return commands


def cli(*args: str, launcher: Sequence[str] = ()) -> list[str]:
    return [sys.executable, *launcher, "-m", "megatron_sbld", *args]


def run_all(title: str, commands: dict[str, list[str]], jobs: int, logs: Path) -> None:
    """Run the commands, `jobs` at a time, each with a log of its own; the first that fails ends the program."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(name: str) -> str | None:
        log = logs / "logs" / f"{name.replace('/', '-')}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as stream:
            status = subprocess.run(commands[name], cwd=ROOT, env=environment, stdout=stream, stderr=stream).returncode
        return None if status == 0 else f"{shlex.join(commands[name])}\nfailed with exit status {status}; see {log}"

    with Progress() as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task(title, total=len(commands))
        for failure in pool.map(run, commands):
            progress.advance(task)
            if failure is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                sys.exit(f"compare_methods.py: error: {failure}")


if __name__ == "__main__":
    main()
