"""What a run writes down as it goes: metrics.jsonl, TensorBoard, Weights & Biases, and progress on the console.

Only rank 0 has one of these. A row of metrics.jsonl is written at once and whole, so a killed run loses no finished
iteration; a resumed run first drops the rows that it is about to repeat.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import os
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_sbld.config.sections import LoggingConfig
from megatron_sbld.data.tokenizer import is_of_bytes

logger = logging.getLogger(__name__)

_NOT_SCALARS = ("iteration", "keep_probs", "kept", "gap", "gap_stderr", "sensitivity", "block_layers")
_LAYER_SCALARS = {"keep_probs": "keep_prob", "gap": "gap", "gap_stderr": "gap_stderr", "sensitivity": "sensitivity"}
"""Fields with a value for each layer, and what TensorBoard calls them."""


def check_logging(config: LoggingConfig) -> None:
    """For all ranks, before anything starts: later the first rank alone would fail, and the others wait for it.

    Raises:
        ValueError: wandb is configured and not installed.
    """
    if config.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"logging.wandb_project = {config.wandb_project!r}: needs wandb (pip install 'megatron-sbld[wandb]')"
        )


class MetricsWriter:
    """Writes the rows of one run.

    Args:
        config: the logging section.
        first_iteration: the first iteration of this process; rows from it on are dropped from an existing file.
        train_iters: iterations of the whole run, for the progress.
        run_config: the resolved config, for Weights & Biases.
    """

    def __init__(
        self, config: LoggingConfig, first_iteration: int, train_iters: int, run_config: dict[str, Any]
    ) -> None:
        self._config = config
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        drop_rows_from(path, first_iteration)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard_writer(run_dir, first_iteration) if config.tensorboard else None
        self._wandb = _wandb_run(config, first_iteration, run_config) if config.wandb_project is not None else None
        self._progress = _ProgressDisplay(config, first_iteration, train_iters)

    def train_row(self, row: dict[str, Any]) -> None:
        """Write an iteration's row and show it."""
        self._write(row)
        self._progress.show(row)

    def valid_row(self, row: dict[str, Any]) -> None:
        """Write a validation's row and show it."""
        self._write(row)
        self._progress.note(f"iteration {row['iteration']}: validation loss {row['valid_loss']:.4f}")

    def tasks_row(self, row: dict[str, Any]) -> None:
        """Write a row of LAMBADA and perplexity and show the figures."""
        self._write(row)
        shown = {
            "lambada_accuracy": "LAMBADA accuracy",
            "lambada_perplexity": "last-word perplexity",
            "perplexity_word_perplexity": "word perplexity",
            "perplexity_bits_per_byte": "bits per byte",
        }
        if is_of_bytes(row.get("perplexity_tokens"), row.get("perplexity_bytes")):
            del shown["perplexity_word_perplexity"]
        figures = [f"{name} {row[metric]:.4g}" for metric, name in shown.items() if row.get(metric) is not None]
        self._progress.note(f"iteration {row['iteration']}: {', '.join(figures)}")

    def sensitivity_row(self, row: dict[str, Any]) -> None:
        """Write an update's row."""
        self._write(row)

    def note(self, text: str) -> None:
        """Show a line of text without disturbing the progress bar."""
        self._progress.note(text)

    def close(self) -> None:
        """Flush and close everything; the display ends with the last iteration shown."""
        self._progress.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        scalars = {name: value for name, value in row.items() if name not in _NOT_SCALARS and value is not None}
        for field, name in _LAYER_SCALARS.items():
            scalars |= {f"{name}/layer_{number:02d}": value for number, value in enumerate(row.get(field, ()), start=1)}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, row["iteration"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=row["iteration"])


def drop_rows_from(path: Path, first_iteration: int) -> None:
    """Remove the rows of iterations that will run again, and torn or damaged lines; atomic.

    Validation rows carry the iteration that they follow, so those of first_iteration - 1 stay.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            repeated = json.loads(line)["iteration"] >= first_iteration
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: left out an incomplete line of %d bytes", path, len(line))
            continue
        if not repeated:
            kept.append(line + b"\n")
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


def set_aside(path: Path) -> None:
    """Move the rows that a former run left to a file beside, for a run that starts anew in its folder."""
    if not path.exists() or not path.stat().st_size:
        return
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    copy = next(copy for copy in numbered if not copy.exists())
    shutil.copyfile(path, copy)
    os.truncate(path, 0)  # a link stays one
    logger.warning("this run starts anew, with no checkpoint of its own: the rows in %s are kept as %s", path, copy)


def _tensorboard_writer(run_dir: Path, first_iteration: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_iteration)


def _wandb_run(config: LoggingConfig, first_iteration: int, run_config: dict[str, Any]) -> Any:
    """The run that earlier processes of this run folder logged to, or a new one from the first iteration on.

    W&B takes no step twice: of iterations that are repeated after a crash it keeps the first values.
    """
    import wandb

    id_file = Path(config.run_dir) / "wandb_id"
    run_id = id_file.read_text(encoding="utf-8") if first_iteration > 1 and id_file.exists() else ""
    if not run_id:
        run_id = uuid.uuid4().hex[:12]
        id_file.write_text(run_id, encoding="utf-8")
    return wandb.init(
        project=config.wandb_project,
        name=config.wandb_name,
        dir=config.run_dir,
        config=run_config,
        id=run_id,
        resume="allow",
        allow_val_change=True,  # a resumed run may have another layout or length
    )


def progress_mode(config: LoggingConfig) -> str:
    """bar, lines or none, as the config and, for auto, the terminal decide."""
    if config.progress == "auto":
        return "bar" if sys.stderr.isatty() else "lines"
    return config.progress


class _ProgressDisplay:
    """A bar on a terminal, lines elsewhere: loss, tokens/s, kept layers, time left."""

    def __init__(self, config: LoggingConfig, first_iteration: int, train_iters: int) -> None:
        self._interval = config.log_interval
        self._train_iters = train_iters
        self._first_iteration = first_iteration
        self._start = time.monotonic()
        self._console = Console(stderr=True)
        mode = progress_mode(config)
        self._lines = mode == "lines"
        self._bar: Progress | None = None
        if mode == "bar":
            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=train_iters, completed=first_iteration - 1, status="")
            self._bar.start()

    def show(self, row: dict[str, Any]) -> None:
        iteration = row["iteration"]
        if iteration % self._interval and iteration != self._train_iters:
            return
        status = (
            f"loss {row['loss']:.4f}  {row['tokens_per_s']:,.0f} tokens/s  kept {row['kept_fraction']:.0%} of layers"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, status=status)
        elif self._lines:
            done = iteration - self._first_iteration + 1
            left = (time.monotonic() - self._start) / done * (self._train_iters - iteration)
            print(
                f"iteration {iteration}/{self._train_iters}  {status}  left {clock(left)}", file=sys.stderr, flush=True
            )

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._console.print(text, markup=False, soft_wrap=True)  # paths in it are copied
        elif self._lines:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
