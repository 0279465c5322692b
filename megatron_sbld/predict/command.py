"""What `megatron-sbld predict` does, from a config and options to text, JSON and plots."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_sbld.config.flops import padded_vocab_size
from megatron_sbld.config.sections import Config
from megatron_sbld.config.stages import placement_of
from megatron_sbld.config.validate import validate
from megatron_sbld.data.tokenizer import load_tokenizer
from megatron_sbld.fields import Count, In, Positive, PositiveShare, check_fields
from megatron_sbld.files.outputs import refuse_inputs
from megatron_sbld.layout.pipeline import Floats
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.in_force import drops, uses_theta
from megatron_sbld.method.validate import validate_drop
from megatron_sbld.predict.calibration import mfu_tokens_per_s
from megatron_sbld.predict.cost import Attention
from megatron_sbld.predict.gain import (
    ASSUMED_MFU,
    Prediction,
    Predictor,
    compared_sections,
)
from megatron_sbld.predict.hardware import KNOWN, load_hardware
from megatron_sbld.predict.iteration import Setup
from megatron_sbld.predict.memory import rank_memory
from megatron_sbld.predict.outcome import Outcome
from megatron_sbld.predict.propose import Proposal, propose_placement
from megatron_sbld.predict.report import print_report
from megatron_sbld.predict.target import check_has_theta, find_target

_MEMORY_ITERATIONS = 64  # of those sampled: how much is held is alike in all


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of the command besides the config's."""

    gpus: Count
    """GPUs of the run; data parallelism takes what the config's parallel sizes leave."""
    hardware: str = "a100-80gb"
    """a100-80gb, h100, h200, or a YAML file with the fields of megatron_sbld.predict.hardware.Hardware."""
    peak_tflops: Positive | None = None
    """Dense peak of a GPU in the training precision, TFLOP/s; None is the hardware's."""
    intra_bandwidth: Positive | None = None
    """GB/s of a GPU to the others of its node, in one direction; None is the hardware's."""
    inter_bandwidth: Positive | None = None
    """GB/s of a GPU to other nodes, in one direction (a node's network / its GPUs); None is the hardware's."""
    gpus_per_node: Count | None = None
    """GPUs of a node; None is the hardware's, 8."""
    attention: Attention = "flash"
    """flash: fused, half of the causal matrix computed and none stored; unfused: all of it computed and stored."""
    baseline_tokens_per_s: Positive | None = None
    """Measured throughput of the undropped run on all GPUs, that the model is calibrated on; None takes mfu."""
    mfu: PositiveShare | None = None
    """Model FLOPs utilisation of the undropped run, in place of a measured throughput; None assumes 0.4."""
    vocab_size: Count | None = None
    """Vocabulary before padding; None is data.tokenizer's."""
    iterations: Count | None = None
    """Iterations of the run; None is the config's."""
    target_gain: Annotated[float, In("(0, 10)")] | None = None
    """Propose the largest theta, and lists, that gain this much: 0.2 is 20 % more throughput."""
    compare_policies: bool = False
    """Also predict every policy at theta 0.9, 0.7 and 0.5; drop.stages stays with the config's own."""
    out: str | None = None
    """Folder for predict.json, timeline.png and, where theta sets the gain, gain.png."""


def predict(config: Config, options: PredictOptions, config_files: Sequence[str] = ()) -> Outcome:
    """Predicts, prints, and writes where asked to, though not over one of `config_files`.

    Raises:
        ValueError: a mistake in the config or the options, by name.
    """
    if options.out is not None:
        files = [Path(options.out) / name for name in ("predict.json", "timeline.png", "gain.png")]
        refuse_inputs("--out", files, [*config_files, options.hardware, config.drop.sensitivity, config.data.tokenizer])
    predictor, assumed_mfu = build_predictor(config, options)
    drop = predictor.setup.config.drop
    if options.target_gain is not None:
        check_has_theta(drop)
    sections = _own_sections(predictor) if drops(drop) else []
    proposals = [found for section in sections if (found := propose_placement(predictor, section)) is not None]
    nothing = dataclasses.replace(drop, policy="none", granularity="layer")
    compared = [predictor.predict(section) for section in compared_sections(drop)] if options.compare_policies else []
    outcome = Outcome(
        setup=predictor.setup,
        assumed_mfu=assumed_mfu,
        efficiency=predictor.efficiency,
        baseline_s=predictor.baseline_s,
        baseline_imbalance=predictor.baseline_imbalance,
        tokens_per_s=predictor.setup.tokens / predictor.baseline_s,
        hours=predictor.hours(predictor.baseline_s),
        parts=predictor.model.undropped_parts(),
        train_iters=predictor.train_iters,
        predictions=_predictions(predictor, sections, nothing, proposals),
        proposals=proposals,
        undropped_proposal=propose_placement(predictor, nothing),
        compared=compared,
        memory=rank_memory(
            predictor.model, _some_shares(predictor) if drops(drop) and predictor.policy(drop).stages is None else None
        ),
        target=None if options.target_gain is None else find_target(predictor, drop, options.target_gain),
    )
    print_report(outcome)
    if options.out is not None:
        _write(predictor, outcome, Path(options.out))
    return outcome


def build_predictor(config: Config, options: PredictOptions) -> tuple[Predictor, float | None]:
    """The calibrated model of a config on the options' hardware, and the MFU that was assumed, if one was."""
    check_fields(options, "--")
    if options.baseline_tokens_per_s is not None and options.mfu is not None:
        raise ValueError(
            f"--baseline_tokens_per_s {options.baseline_tokens_per_s} and --mfu {options.mfu} exclude each other: give "
            "the measured one"
        )
    hardware = load_hardware(
        options.hardware,
        peak_tflops=options.peak_tflops,
        intra_bandwidth=options.intra_bandwidth,
        inter_bandwidth=options.inter_bandwidth,
        gpus_per_node=options.gpus_per_node,
    )
    validate(config, options.gpus, trains=False)
    if options.iterations is not None:
        config = _of_length(config, options.iterations)
    setup = Setup(
        config=config,
        vocab_size=padded_vocab_size(_vocab_size(config, options), config),
        hardware=hardware,
        gpus=options.gpus,
        attention=options.attention,
        placement=placement_of(config),
    )
    if options.baseline_tokens_per_s is not None:
        return Predictor(setup, options.baseline_tokens_per_s), None
    if config.training.precision == "fp32" and options.hardware in KNOWN and options.peak_tflops is None:
        raise ValueError(
            f"training.precision = 'fp32': the peak of {options.hardware} is that of bf16; give --peak_tflops, or a "
            "measured --baseline_tokens_per_s"
        )
    mfu = ASSUMED_MFU if options.mfu is None else options.mfu
    return Predictor(setup, mfu_tokens_per_s(setup, mfu)), mfu


def _of_length(config: Config, iterations: int) -> Config:
    """A valid config's run with other iterations; what else goes by them, as the learning rate does, is not read."""
    stages = config.parallel.pipeline_model_parallel_size
    even = config.parallel.pipeline_model_parallel_layout is None
    validate_drop(config.drop, config.model.num_layers, iterations, stages if even else None)
    training = dataclasses.replace(config.training, train_iters=iterations, train_samples=None)
    return dataclasses.replace(config, training=training)


def _vocab_size(config: Config, options: PredictOptions) -> int:
    if options.vocab_size is not None:
        return options.vocab_size
    try:
        return load_tokenizer(config.data.tokenizer).vocab_size
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {error}; or give --vocab_size (GPT-2's is 50257)") from error


def _own_sections(predictor: Predictor) -> list[DropConfig]:
    """The config's drop section, on a pipeline with either sampler; policy staged draws nothing.

    Interleaved, the balanced sampler evens what ranks hold; that it can even chunks instead (balance_stages) is shown.
    """
    drop, placement = predictor.setup.config.drop, predictor.setup.placement
    sections = [drop]
    if placement.num_ranks > 1 and drop.replicas == "shared" and drop.policy not in ("none", "staged"):
        balanced = drop if drop.sampler == "balanced" else dataclasses.replace(drop, sampler="balanced")
        # Stages share out their layers among balance_stages whatever the sampler.
        stages = None if drop.stages is None else drop.balance_stages
        sections = [dataclasses.replace(drop, sampler="bernoulli", balance_stages=stages), balanced]
        chunks = len(placement.layers_per_chunk)
        evens_ranks = drop.balance_stages is None and drop.stages is None
        if placement.is_interleaved and placement.is_even and evens_ranks:
            sections.append(dataclasses.replace(balanced, balance_stages=chunks))
    return sections


def _predictions(
    predictor: Predictor, sections: list[DropConfig], nothing: DropConfig, proposals: list[Proposal]
) -> list[Prediction]:
    """Of the sections on the config's placement, then by proposed placement, where the undropped model is first."""
    predictions = [predictor.predict(section) for section in sections]
    fitting = [proposal for proposal in proposals if proposal.fits]
    for placement in dict.fromkeys(proposal.placement for proposal in fitting):
        predictions.append(predictor.predict(nothing, placement))
        predictions += [proposal.prediction for proposal in fitting if proposal.placement == placement]
    return predictions


def _some_shares(predictor: Predictor) -> Floats:
    drop = predictor.setup.config.drop
    iterations = predictor.sampled(drop)[:: max(1, len(predictor.sampled(drop)) // _MEMORY_ITERATIONS)]
    return predictor.shares(drop, predictor.policy(drop), iterations, predictor.setup.placement, held=True)[0]


def _write(predictor: Predictor, outcome: Outcome, folder: Path) -> None:
    from megatron_sbld.predict.plots import plot_gain, plot_timeline

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "predict.json", folder / "timeline.png"]
    files[0].write_text(json.dumps(as_json(outcome), indent=2) + "\n", encoding="utf-8")
    plot_timeline(predictor, files[1])
    if outcome.predictions and uses_theta(outcome.setup.config.drop):
        files.append(folder / "gain.png")
        plot_gain(predictor, files[-1])
    print("\n" + "\n".join(f"saved {file}" for file in files))


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON's types, with what it was predicted for."""
    setup = outcome.setup
    values = {
        field.name: _plain(getattr(outcome, field.name))
        for field in dataclasses.fields(outcome)
        if field.name != "setup"
    }
    config = dataclasses.asdict(setup.config)
    return {
        "hardware": dataclasses.asdict(setup.hardware),
        "gpus": setup.gpus,
        "attention": setup.attention,
        "padded_vocab_size": setup.vocab_size,
        "config": {name: config[name] for name in ("model", "parallel", "training", "drop")},
        "data_parallel_size": setup.replicas,
        "num_microbatches": setup.num_microbatches,
        **values,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
