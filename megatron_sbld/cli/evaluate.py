"""`megatron-sbld evaluate`: LAMBADA and perplexity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jsonargparse import Namespace

from megatron_sbld.cli.command import Command, run_part
from megatron_sbld.cli.parser import CommandParser

if TYPE_CHECKING:
    from megatron_sbld.evaluation.tasks import Task


def _lambada(args: list[str]) -> int:
    from megatron_sbld.data.documents import InputFormat

    parser = _evaluate_parser(
        "lambada --checkpoint DIR [DIR ...] --data FILE [--raw] [options]",
        "Score the last word of each passage, given the passage: right when each of its tokens is the most likely one. "
        "The target is what follows the last space.",
        'passages: one a line, tokenised with spaces as LAMBADA is distributed, or JSON lines, {"text": passage}; .gz '
        "and .xz are unpacked",
    )
    parser.add_argument("--format", type=InputFormat, default="auto", help="of the data")
    parser.add_argument(
        "--raw", action="store_true", help="score plain text as it is, with spaces between tokens, not detokenised"
    )
    given = parser.parse_args(args)

    from megatron_sbld.evaluation.tasks import LambadaTask

    return _run(given, LambadaTask(given.data, given.format, raw=given.raw, limit=given.limit))


def _perplexity(args: list[str]) -> int:
    from megatron_sbld.config.sections import TextFormat

    parser = _evaluate_parser(
        "perplexity --checkpoint DIR [DIR ...] --data PATH [--format wikitext] [--stride N] [options]",
        "Score every token of a text, each once, in windows of the model's context; a document's first token is given "
        "the end-of-document token.",
        "a file or folder of text or JSON lines (.gz and .xz too), or the prefix of a prepared data set",
    )
    parser.add_argument(
        "--format",
        type=TextFormat,
        default="auto",
        help="of the data; wikitext: articles are documents, text is detokenised, words are counted before that",
    )
    parser.add_argument(
        "--stride",
        type=int | None,
        help="tokens by which windows advance: each token is given context - stride tokens at least; default: half of "
        "the context, for wikitext all of it (disjoint windows)",
    )
    parser.add_argument("--separator", type=str | None, help="text: a line equal to this ends a document")
    parser.add_argument("--text_key", default="text", help="JSON lines: the key of the text")
    given = parser.parse_args(args)

    from megatron_sbld.evaluation.tasks import PerplexityTask

    task = PerplexityTask(
        given.data,
        given.format,
        stride=given.stride,
        separator=given.separator,
        text_key=given.text_key,
        limit=given.limit,
    )
    return _run(given, task)


def _evaluate_parser(usage: str, description: str, data: str) -> CommandParser:
    from megatron_sbld.evaluation.options import ModelOptions

    parser = CommandParser(
        f"evaluate {usage}",
        f"{description} Runs on one process, or under torchrun on many and on any layout, not only that of "
        "training. Results are kept in the run folder's evaluations.jsonl; `megatron-sbld compare` shows them beside "
        "loss, time and gain.",
    )
    parser.add_argument(
        "--checkpoint",
        action="extend",
        nargs="+",
        required=True,
        help="checkpoints, or folders of checkpoints or run folders, of which the newest complete one is taken",
    )
    parser.add_argument(
        "--every_checkpoint", action="store_true", help="take all complete checkpoints of each folder, and plot them"
    )
    parser.add_argument("--data", required=True, help=data)
    parser.add_argument(
        "--limit", type=int | None, help="passages or documents that are scored, from the first; default: all"
    )
    parser.add_argument(
        "--out",
        type=str | None,
        help="folder for the results, whose rows then name their checkpoint; default: the run folder of each",
    )
    parser.add_class_arguments(ModelOptions)
    return parser


def _run(given: Namespace, task: Task) -> int:
    from megatron_sbld.config.files import field_names
    from megatron_sbld.evaluation.model import read_trained_models
    from megatron_sbld.evaluation.options import ModelOptions
    from megatron_sbld.evaluation.run import evaluate_checkpoints
    from megatron_sbld.report.record import Record

    options = ModelOptions(**{name: given[name] for name in field_names(ModelOptions)})
    models = read_trained_models(given.checkpoint, options, every_checkpoint=given.every_checkpoint)
    record = Record(task, models, given.out)
    evaluate_checkpoints(
        task,
        models,
        options.parallel(),
        precision=options.precision,
        batch_tokens=options.batch_tokens,
        on_result=record.add,
    )
    record.close()
    return 0


_PARTS = [
    Command("lambada", "accuracy and perplexity of the last word of each passage", _lambada),
    Command(
        "perplexity",
        "of any text, by token, word and byte, in sliding windows; WikiText by convention",
        _perplexity,
    ),
]
COMMAND = Command(
    "evaluate",
    "LAMBADA and perplexity of trained models",
    lambda args: run_part("evaluate", _PARTS, args, "--checkpoint DIR [DIR ...] --data FILE [options]"),
    _PARTS,
)
