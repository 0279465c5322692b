"""Shows and keeps what evaluations come to: a table, evaluations.jsonl, examples, a plot over iterations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sbld.data.tokenizer import is_of_bytes
from megatron_sbld.evaluation.model import TrainedModel
from megatron_sbld.evaluation.perplexity import PerplexityResult
from megatron_sbld.evaluation.results import EVALUATIONS_FILE, read_evaluations, save_evaluations
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
        ValueError: no folder is given, and a checkpoint does not lie in a run folder.
    """

    def __init__(self, task: Task, models: Sequence[TrainedModel], out: str | None) -> None:
        self._task = task
        self._out = None if out is None else Path(out)
        self._models = models
        self._evaluated: list[Evaluated] = []
        for trained in models:
            if self._folder(trained) is None:
                raise ValueError(
                    f"checkpoint {trained.checkpoint.path} does not lie in a run folder, where its results could be "
                    "kept; name a folder with --out"
                )
        data = [task.data, f"{task.data}.bin", f"{task.data}.idx"]
        refuse_inputs("--out", [file for trained in models for file in self._files(trained)], data)

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
        save_evaluations([row], folder / EVALUATIONS_FILE)
        if asked.write_examples is not None:
            asked.write_examples(evaluated.scores, self._files(trained)[1])
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
        by_folder: dict[Path, str] = {}
        for trained in self._models:
            folder = self._folder(trained)
            assert folder is not None, "checked before anything was evaluated"
            by_folder[folder] = str(trained.run_dir or folder)
        curves = [Curve(label, [read_evaluations(folder / EVALUATIONS_FILE)]) for folder, label in by_folder.items()]
        file = next(iter(by_folder)) / "evaluations" / f"{self._task.name}.png"
        file.parent.mkdir(exist_ok=True)
        plot_evaluations(curves, file)
        print_line(f"saved {file}", console)

    def _files(self, trained: TrainedModel) -> list[Path]:
        """What may be written: results, examples, plot."""
        folder = self._folder(trained)
        assert folder is not None, "checked before anything was evaluated"
        name = self._task.name
        examples = f"{name}_{Path(self._task.data).stem}_{trained.checkpoint.iteration:07d}.jsonl"
        return [folder / EVALUATIONS_FILE, folder / "evaluations" / examples, folder / "evaluations" / f"{name}.png"]

    def _folder(self, trained: TrainedModel) -> Path | None:
        return self._out or trained.run_dir


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
