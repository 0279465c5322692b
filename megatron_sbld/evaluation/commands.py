"""The commands that judge trained models and take them elsewhere: parse and dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from megatron_sbld.command_parser import CommandParser

if TYPE_CHECKING:
    from megatron_sbld.evaluation.tasks import Task


_EVALUATE_USAGE = """usage: megatron-sbld evaluate lambada|perplexity --checkpoint DIR [DIR ...] --data FILE [options]

  lambada     accuracy and perplexity of the last word of each passage
  perplexity  of any text, by token, word and byte, in sliding windows; WikiText by convention

`megatron-sbld evaluate lambada --help` and `perplexity --help` say what each takes."""


def evaluate(args: list[str]) -> int:
    """`megatron-sbld evaluate`."""
    commands: dict[str, Callable[[list[str]], int]] = {"lambada": _lambada, "perplexity": _perplexity}
    if not args or args[0] in ("-h", "--help"):
        print(_EVALUATE_USAGE)
        return 0
    if args[0] not in commands:
        raise ValueError(f"unknown command 'evaluate {args[0]}'; allowed are {', '.join(commands)}")
    return commands[args[0]](args[1:])


def _lambada(args: list[str]) -> int:
    parser = _evaluate_parser(
        "lambada --checkpoint DIR [DIR ...] --data FILE [--raw] [options]",
        "Score the last word of each passage, given the passage: right when each of its tokens is the most likely one. "
        "The target is what follows the last space.",
        'passages: one a line, tokenised with spaces as LAMBADA is distributed, or JSON lines, {"text": passage}; .gz '
        "and .xz are unpacked",
    )
    parser.add_argument("--format", type=Literal["auto", "text", "jsonl"], default="auto", help="of the data")
    parser.add_argument(
        "--raw", action="store_true", help="score plain text as it is, with spaces between tokens, not detokenised"
    )
    given = parser.parse_args(args)

    from megatron_sbld.evaluation.tasks import LambadaTask

    return _run(given, LambadaTask(given.data, given.format, raw=given.raw, limit=given.limit))


def _perplexity(args: list[str]) -> int:
    parser = _evaluate_parser(
        "perplexity --checkpoint DIR [DIR ...] --data PATH [--format wikitext] [--stride N] [options]",
        "Score every token of a text, each once, in windows of the model's context; a document's first token is given "
        "the end-of-document token.",
        "a file or folder of text or JSON lines (.gz and .xz too), or the prefix of a prepared data set",
    )
    parser.add_argument(
        "--format",
        type=Literal["auto", "text", "jsonl", "wikitext", "dataset"],
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
    from megatron_sbld.evaluation.model import ModelOptions

    parser = CommandParser(
        f"evaluate {usage}",
        f"{description} Runs on one process, or under torchrun on many and on any layout, also another than the "
        "training's. Results are kept in the run folder's evaluations.jsonl; `megatron-sbld compare` shows them beside "
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
    from megatron_sbld.evaluation.model import ModelOptions, read_trained_models
    from megatron_sbld.evaluation.run import evaluate_checkpoints
    from megatron_sbld.report.record import Record
    from megatron_sbld.training.config_file import field_names

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


_NOT_IN_GENERATION = {"batch_tokens", "sequence_parallel"}
"""Fields of ModelOptions that generation has no use for."""


def generate(args: list[str]) -> int:
    """`megatron-sbld generate`."""
    given = _generate_parser().parse_args(args)

    from megatron_sbld.evaluation.generate import Sampling, encode_prompt
    from megatron_sbld.evaluation.generate import generate as continue_prompts
    from megatron_sbld.evaluation.model import ModelOptions, read_trained_models
    from megatron_sbld.evaluation.prompts import read_prompts, shown
    from megatron_sbld.outputs import refuse_inputs
    from megatron_sbld.training.config_file import field_names

    sampling = Sampling(**{name: given[name] for name in field_names(Sampling)})
    names = [name for name in field_names(ModelOptions) if name not in _NOT_IN_GENERATION]
    options = ModelOptions(**{name: given[name] for name in names})
    texts = [*given.prompt, *(read_prompts(given.prompts) if given.prompts else [])]
    if not texts:
        raise ValueError("there is no prompt: give --prompt TEXT or --prompts FILE; --prompt '' starts a new document")
    (trained,) = read_trained_models([given.checkpoint], options, every_checkpoint=False)
    if given.out is not None:
        run = [] if trained.run_dir is None else [trained.run_dir / name for name in ("config.yaml", "metrics.jsonl")]
        refuse_inputs("--out", [given.out], [given.prompts, trained.checkpoint.path, trained.tokenizer.name, *run])
    prompts = [encode_prompt(trained.tokenizer, text) for text in texts]
    with shown(trained, texts, prompts, sampling.num_samples, given.out) as show:
        continue_prompts(trained, prompts, sampling, options.parallel(), precision=options.precision, on_result=show)
    return 0


def _generate_parser() -> CommandParser:
    from megatron_sbld.evaluation.generate import Sampling
    from megatron_sbld.evaluation.model import ModelOptions

    parser = CommandParser(
        "generate --checkpoint DIR --prompt TEXT [options]",
        "Continue prompts with a trained model, at full depth. Run it under torchrun for a model that is spread over "
        "several processes; the replicas that are left share the prompts.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint, or folder of checkpoints or run folder, of which the newest complete one is taken",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="text to continue, may be repeated; '' starts a new document"
    )
    parser.add_argument(
        "--prompts",
        type=str | None,
        help='file with a prompt a line, or .jsonl with {"prompt": text} a line, as --out writes it',
    )
    parser.add_argument(
        "--out", type=str | None, help="JSON lines to write: tokens, their log-probabilities and what ended each"
    )
    parser.add_class_arguments(Sampling)
    parser.add_class_arguments(ModelOptions, skip=_NOT_IN_GENERATION)
    return parser


_EXPORT_USAGE = (
    "export hf --checkpoint DIR OUT [--dtype TYPE] [--max_shard_size SIZE] [--tokenizer SPEC] [--config FILE]"
)
_IMPORT_USAGE = "import hf SOURCE OUT [--precision TYPE] [--tokenizer SPEC] [--pad_vocab_to_multiple_of N]"


def export(args: list[str]) -> int:
    """`megatron-sbld export hf`."""
    parser = CommandParser(
        _EXPORT_USAGE,
        "Write a checkpoint as a folder that Hugging Face's transformers loads without remote code: in the GPT-2 "
        "format (learned positions, LayerNorm, GeLU), the Llama format (rotary positions, RMSNorm, SwiGLU) or the "
        "GPT-NeoX format (rotary positions, LayerNorm, GeLU). One process on the CPU, in memory for one layer and one "
        "shard, from any parallel layout.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a checkpoint, or the newest of a run folder; also Megatron-LM's (torch_dist)",
    )
    parser.add_argument("out", help="folder to make")
    parser.add_argument(
        "--dtype", type=Literal["fp32", "bf16", "fp16", "as-saved"], default="as-saved", help="type of the weights"
    )
    parser.add_argument("--max_shard_size", default="5GB", help="largest file: 5GB, 500MB, 2GiB, ...")
    parser.add_argument(
        "--tokenizer",
        type=str | None,
        help="byte, a tokenizer.json or a folder; default: data.tokenizer of the run, whose fingerprint it must have",
    )
    parser.add_argument(
        "--config", type=str | None, help="YAML file whose model section describes a checkpoint of Megatron-LM"
    )
    given = parser.parse_args(_of_hf("export", _EXPORT_USAGE, args))

    from megatron_sbld.evaluation.hf_export import export_hf

    exported = export_hf(
        given.checkpoint,
        given.out,
        dtype=given.dtype,
        max_shard_size=given.max_shard_size,
        tokenizer=given.tokenizer,
        config=given.config,
    )
    print(exported.summary())
    return 0


def import_(args: list[str]) -> int:
    """`megatron-sbld import hf`."""
    parser = CommandParser(
        _IMPORT_USAGE,
        "Make a checkpoint of a local folder in Hugging Face's GPT-2, Llama or GPT-NeoX format, with a config.yaml to "
        "start `pretrain` and `profile` from, on any parallel layout. Weights from safetensors, or from "
        "pytorch_model.bin as far as it holds nothing but tensors; no code of the source is run.",
    )
    parser.add_argument("source", help="folder with config.json, weights and tokenizer files")
    parser.add_argument("out", help="folder to make: config.yaml, checkpoints/, tokenizer/")
    parser.add_argument(
        "--precision",
        type=Literal["fp32", "bf16", "fp16"] | None,
        help="of the weights, and training.precision; default: as the source has it",
    )
    parser.add_argument(
        "--tokenizer", type=str | None, help="byte, a tokenizer.json or a folder; default: the source's own files"
    )
    parser.add_argument(
        "--pad_vocab_to_multiple_of",
        type=int,
        default=1,
        help="append copies of the vocabulary's last row: tensor parallelism of size N needs a multiple of N",
    )
    given = parser.parse_args(_of_hf("import", _IMPORT_USAGE, args))

    from megatron_sbld.evaluation.hf_import import import_hf

    imported = import_hf(
        given.source,
        given.out,
        precision=given.precision,
        tokenizer=given.tokenizer,
        pad_vocab_to_multiple_of=given.pad_vocab_to_multiple_of,
    )
    print(imported.summary())
    return 0


def _of_hf(command: str, usage: str, args: list[str]) -> list[str]:
    """The arguments after `hf`, the one library that there is a way to and from; --help may stand alone."""
    if not args or args[0] in ("-h", "--help"):
        return ["--help"]
    if args[0] != "hf":
        raise ValueError(f"unknown command '{command} {args[0]}'; allowed is megatron-sbld {usage}")
    return args[1:]
