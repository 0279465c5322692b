"""Shows and keeps what evaluations come to: a table, evaluations.jsonl, examples, a plot over iterations."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sbld.data.tokenizer import is_of_bytes
from megatron_sbld.evaluation.model import TrainedModel
from megatron_sbld.evaluation.perplexity import PerplexityResult
from megatron_sbld.evaluation.results import EVALUATIONS_FILE, Evaluation, read_evaluations, save_evaluations
from megatron_sbld.evaluation.run import Evaluated
from megatron_sbld.evaluation.tasks import Task
from megatron_sbld.files.outputs import refuse_inputs
from megatron_sbld.report.evaluation import Curve
from megatron_sbld.report.evaluation_plots import plot_evaluations
from megatron_sbld.report.table import print_line, print_wide

_COLUMNS = {
    "lambada": {"accuracy": ("accuracy", 100, " %"), "perplexity": ("last-word perplexity", 1, "")},
    "perplexity": {
        "token_perplexity": ("perplexity by token", 1, ""),
        "word_perplexity": ("by word", 1, ""),
        "bits_per_byte": ("bits per byte", 1, ""),
    },
}
"""Of each task the metrics shown: heading, factor, unit."""


class Record:
    """The evaluations of one command, on rank 0.

    Args:
        task: what is asked.
        models: of whom.
        out: folder for everything; None is each model's run folder.

    Raises:
        ValueError: no folder is given, and a checkpoint does not lie in a run folder; or earlier results there are
            damaged.
        OSError: a folder cannot be made or written.
    """

    def __init__(self, task: Task, models: Sequence[TrainedModel], out: str | None) -> None:
        self._task = task
        self._out = None if out is None else Path(out)
        self._models = models
        self._evaluated: list[Evaluated] = []
        for trained in models:
            if self._folder(trained) is None:
                raise ValueError(
                    f"checkpoint {trained.checkpoint.path} is not in a run folder, so there is no place for its "
                    "results; give a folder with --out"
                )
        data = [task.data, f"{task.data}.bin", f"{task.data}.idx"]
        refuse_inputs("--out", [file for trained in models for file in self._files(trained)], data)
        if int(os.environ.get("RANK", "0")) == 0:  # the one that writes, after what may have taken hours
            for trained in models:
                _check_writable(self._files(trained)[0])

    def add(self, evaluated: Evaluated) -> None:
        """Keep a result, so that it is there whatever happens to those that follow."""
        trained, asked = evaluated.trained, evaluated.asked
        folder = self._folder(trained)
        assert folder is not None, "checked before anything was evaluated"
        row = asked.evaluation(
            self._task,
            evaluated.result,
            iteration=trained.checkpoint.iteration,
            consumed_tokens=trained.consumed_tokens,
            train_time_s=trained.train_time_s,
            precision=evaluated.precision,
        )
        row = dataclasses.replace(row, checkpoint=self._checkpoint(trained))
        if asked.write_examples is not None:
            row = dataclasses.replace(row, examples=_examples_of(row))
            asked.write_examples(evaluated.scores, folder / str(row.examples))
        save_evaluations([row], folder / EVALUATIONS_FILE)
        self._evaluated.append(evaluated)

    def close(self) -> None:
        """Show all results, and where they are."""
        if not self._evaluated:  # another rank
            return
        console = Console()
        columns = dict(_COLUMNS[self._task.name])
        results = [evaluated.result for evaluated in self._evaluated]
        if all(isinstance(found, PerplexityResult) and is_of_bytes(found.tokens, found.bytes) for found in results):
            del columns["word_perplexity"]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("checkpoint", no_wrap=True)
        for heading in ("iteration", "tokens", *(heading for heading, _, _ in columns.values()), "tokens/s"):
            table.add_column(heading, justify="right")
        for evaluated in self._evaluated:
            trained, result = evaluated.trained, evaluated.result
            tokens = "-" if trained.consumed_tokens is None else f"{trained.consumed_tokens:,}"
            figures = [
                _figure(getattr(result, name), getattr(result, f"{name}_stderr"), factor, unit)
                for name, (_, factor, unit) in columns.items()
            ]
            table.add_row(
                Text(str(trained.run_dir or trained.checkpoint.path)),
                f"{trained.checkpoint.iteration:,}",
                tokens,
                *figures,
                f"{evaluated.tokens_per_s:,.0f}",
            )
        print_wide(table, console)
        notes = [note for evaluated in self._evaluated for note in _notes(evaluated)]
        notes += [f"kept in {folder / EVALUATIONS_FILE}" for folder in map(self._folder, self._models) if folder]
        for note in dict.fromkeys(notes):
            print_line(f"  {note}", console, style="dim")
        self._plot(console)

    def _plot(self, console: Console) -> None:
        """Figures against iterations, where some model was evaluated at several; from now or before."""
        if len(self._models) == 1:
            return
        by_run: dict[Path, Curve] = {}
        for trained in self._models:
            checkpoints = trained.checkpoint.path.resolve().parent
            if checkpoints not in by_run:
                own = str(checkpoints) if self._checkpoint(trained) else None
                rows = [row for row in read_evaluations(self._files(trained)[0]) if _checkpoints_of(row) == own]
                by_run[checkpoints] = Curve(str(trained.run_dir or checkpoints), [rows])
        curves, file = list(by_run.values()), self._files(self._models[0])[1]
        file.parent.mkdir(exist_ok=True)
        plot_evaluations(curves, file)
        print_line(f"saved {file}", console)

    def _files(self, trained: TrainedModel) -> list[Path]:
        """What may be written besides examples: results, plot."""
        folder = self._folder(trained)
        assert folder is not None, "checked before anything was evaluated"
        return [folder / EVALUATIONS_FILE, folder / "evaluations" / f"{self._task.name}.png"]

    def _checkpoint(self, trained: TrainedModel) -> str | None:
        """What a row says of its checkpoint: its path where other runs may have rows in the same folder."""
        folder = self._folder(trained)
        is_own = folder is not None and trained.run_dir is not None and folder.resolve() == trained.run_dir.resolve()
        return None if is_own else str(trained.checkpoint.path.resolve())

    def _folder(self, trained: TrainedModel) -> Path | None:
        return self._out or trained.run_dir


def _check_writable(file: Path) -> None:
    """Raises what writing rows into the file would: OSError, or ValueError for rows that are damaged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file.parent))
    if file.exists():
        read_evaluations(file)


def _examples_of(row: Evaluation) -> str:
    """A file that rows of other data, options or checkpoints do not have."""
    told = hashlib.sha256(row.key.encode()).hexdigest()[:8]
    return f"evaluations/{row.task}_{Path(row.data.name).stem}_{row.iteration:07d}_{told}.jsonl"


def _checkpoints_of(row: Evaluation) -> str | None:
    """The folder of a row's checkpoint; None for one in the folder of its run."""
    return None if row.checkpoint is None else str(Path(row.checkpoint).parent)


def _figure(value: float | None, stderr: float | None, factor: float, unit: str) -> str:
    if value is None:
        return "-"
    digits = f"{factor * value:.4g}"
    return f"{digits}{unit}" if stderr is None else f"{digits} +- {factor * stderr:.2g}{unit}"


def _notes(evaluated: Evaluated) -> list[str]:
    """What a reader of the figures should know."""
    result, taken = evaluated.result, evaluated.asked.notes
    if isinstance(result, PerplexityResult):
        return [*taken, f"{result.tokens:,} tokens of {result.documents:,} documents in {result.windows:,} windows"]
    notes = [*taken, f"{result.passages:,} passages"]
    if result.truncated:
        notes.append(f"{result.truncated:,} of them longer than the model's context: their beginnings are left out")
    if result.glued:
        notes.append(f"{result.glued:,} targets begin with a quote or bracket that stood apart in the file")
    return notes
