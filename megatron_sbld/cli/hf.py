"""`megatron-sbld export hf` and `import hf`: models to and from Hugging Face's formats."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sbld.cli.command import Command
from megatron_sbld.cli.parser import CommandParser

_EXPORT_USAGE = (
    "export hf --checkpoint DIR OUT [--dtype TYPE] [--max_shard_size SIZE] [--tokenizer SPEC] [--config FILE]"
)
_IMPORT_USAGE = "import hf SOURCE OUT [--precision TYPE] [--tokenizer SPEC] [--pad_vocab_to_multiple_of N]"


def _export(args: list[str]) -> int:
    """`megatron-sbld export hf`."""
    from megatron_sbld.hf.options import ExportDtype

    parser = CommandParser(
        _EXPORT_USAGE,
        "Write a checkpoint as a folder that Hugging Face's transformers loads without remote code: in the GPT-2 "
        "format (learned positions, LayerNorm, GeLU), the Llama format (rotary positions, RMSNorm, SwiGLU) or the "
        "GPT-NeoX format (rotary positions, LayerNorm, GeLU). From any parallel layout, on the CPU, with memory for "
        "one layer and one shard.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a checkpoint, or the newest of a run folder; also Megatron-LM's (torch_dist)",
    )
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--dtype", type=ExportDtype, default="as-saved", help="type of the weights")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file: 5GB, 500MB, 2GiB, ...")
    _add_tokenizer(parser, "data.tokenizer of the run, whose fingerprint it must have")
    parser.add_argument(
        "--config", type=str | None, help="YAML file whose model section describes a checkpoint of Megatron-LM"
    )
    given = parser.parse_args(_of_hf("export", _EXPORT_USAGE, args))

    from megatron_sbld.hf.export_model import export_hf

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


def _add_tokenizer(parser: CommandParser, default: str) -> None:
    parser.add_argument("--tokenizer", type=str | None, help=f"byte, a tokenizer.json or a folder; default: {default}")


def _import(args: list[str]) -> int:
    """`megatron-sbld import hf`."""
    from megatron_sbld.config.sections import Precision

    parser = CommandParser(
        _IMPORT_USAGE,
        "Make a checkpoint of a local folder in Hugging Face's GPT-2, Llama or GPT-NeoX format, with a config.yaml to "
        "start `pretrain` and `sensitivity measure` from, on any parallel layout. Weights from safetensors, or from "
        "a pytorch_model.bin that holds only tensors; no code of the source is run.",
    )
    parser.add_argument("source", help="folder with config.json, weights and tokenizer files")
    parser.add_argument("out", help="folder to make: config.yaml, checkpoints/, tokenizer/")
    parser.add_argument(
        "--precision",
        type=Precision | None,
        help="of the weights, and training.precision; default: as the source has it",
    )
    _add_tokenizer(parser, "the source's own files")
    parser.add_argument(
        "--pad_vocab_to_multiple_of",
        type=int,
        default=1,
        help="append copies of the vocabulary's last row: tensor parallelism of size N needs a multiple of N",
    )
    given = parser.parse_args(_of_hf("import", _IMPORT_USAGE, args))

    from megatron_sbld.hf.import_model import import_hf

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


def _with_part(name: str, summary: str, run: Callable[[list[str]], int]) -> Command:
    """A command that checks by itself that its one part is `hf`."""
    return Command(name, summary, run, [Command("hf", summary, lambda args: run(["hf", *args]))])


EXPORT = _with_part("export", "write a checkpoint as a folder that Hugging Face's transformers loads", _export)
IMPORT = _with_part("import", "make a checkpoint from a Hugging Face folder: GPT-2, Llama or GPT-NeoX", _import)
