"""`megatron-sbld generate`."""

from __future__ import annotations

from megatron_sbld.cli.command import Command
from megatron_sbld.cli.parser import CommandParser

_NOT_IN_GENERATION = {"batch_tokens", "sequence_parallel"}
"""Fields of ModelOptions that generation has no use for."""


def _generate(args: list[str]) -> int:
    """`megatron-sbld generate`."""
    given = _generate_parser().parse_args(args)

    from megatron_sbld.config.files import field_names
    from megatron_sbld.evaluation.generate import encode_prompt
    from megatron_sbld.evaluation.generate import generate as continue_prompts
    from megatron_sbld.evaluation.model import read_trained_models
    from megatron_sbld.evaluation.options import ModelOptions, Sampling
    from megatron_sbld.evaluation.prompts import read_prompts, shown
    from megatron_sbld.files.outputs import refuse_inputs

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
    from megatron_sbld.evaluation.options import ModelOptions, Sampling

    parser = CommandParser(
        "generate --checkpoint DIR --prompt TEXT [options]",
        "Continue prompts with a trained model, at full depth; one that is still growing, with the layers that have "
        "begun. Run it under torchrun for a model that is spread over several processes; data-parallel replicas "
        "share the prompts.",
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
        help='file with one prompt on each line, or .jsonl with {"prompt": text} a line, as --out writes it',
    )
    parser.add_argument(
        "--out", type=str | None, help="JSON lines to write: tokens, their log-probabilities and what ended each"
    )
    parser.add_class_arguments(Sampling)
    parser.add_class_arguments(ModelOptions, skip=_NOT_IN_GENERATION)
    return parser


COMMAND = Command("generate", "continue prompts with a trained model", _generate)
