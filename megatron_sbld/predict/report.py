"""A prediction as text. It formats figures and computes none."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sbld.config.flops import model_flops_per_token
from megatron_sbld.method.in_force import dropped_update
from megatron_sbld.predict.gain import Prediction
from megatron_sbld.predict.memory import MARGIN, RankMemory
from megatron_sbld.predict.outcome import Outcome
from megatron_sbld.predict.parameters import num_parameters
from megatron_sbld.predict.propose import Proposal
from megatron_sbld.predict.target import Target

_WORTH_SAYING = 0.002  # of an iteration: parts below it are summed up as others
_ROUNDING = 1e-9


def print_report(outcome: Outcome) -> None:
    """Prints everything, for a console of about 100 columns."""
    sections = [_head(outcome), _parts(outcome), _gains(outcome)]
    own = _own_prediction(outcome)
    if own is not None and own.stages:
        sections.append(_stages(own, outcome))
    if outcome.compared:
        staged = " (drop.stages only with the config's own policy)" if own is not None and own.stages else ""
        sections.append(f"every policy{staged}\n" + prediction_table(outcome.compared, outcome))
    sections.append(_memory(outcome))
    if outcome.target is not None:
        sections.append(_target(outcome.target))
    print("\n\n".join(sections))


def _head(outcome: Outcome) -> str:
    setup = outcome.setup
    config, hardware = setup.config, setup.hardware
    model, parallel, training = config.model, config.parallel, config.training
    size = num_parameters(config, setup.vocab_size)
    context = f" x CP {parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else ""
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    interleaved = f", {virtual} chunks a stage" if virtual else ""
    per_gpu = outcome.tokens_per_s * model_flops_per_token(model, setup.vocab_size) / setup.gpus / 1e12
    if outcome.assumed_mfu is None:
        basis = f"measured baseline of {outcome.tokens_per_s:,.0f} tokens/s"
    else:
        basis = f"ASSUMED baseline: MFU {outcome.assumed_mfu:.0%} = {outcome.tokens_per_s:,.0f} tokens/s"
    return "\n".join(
        [
            f"GPT of {size / 1e9:.2f}B parameters ({model.num_layers} layers, hidden {model.hidden_size}) on "
            f"{setup.gpus} x {hardware.name}",
            f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size}{context} x DP "
            f"{setup.replicas}{interleaved}; {setup.num_microbatches} microbatches of {training.micro_batch_size} a "
            f"replica, {setup.tokens:,} tokens an iteration",
            f"{basis} ({per_gpu:.1f} model TFLOP/s a GPU); calibrated on it: matrix products at "
            f"{outcome.efficiency:.1%} of {hardware.peak_tflops:g} TFLOP/s",
        ]
    )


def _parts(outcome: Outcome) -> str:
    total = outcome.baseline_s
    shown = {name: seconds for name, seconds in outcome.parts.items() if abs(seconds) > _WORTH_SAYING * total}
    others = sum(outcome.parts.values()) - sum(shown.values())
    if others > _ROUNDING * total:
        shown["others"] = others
    lines = [f"{'undropped iteration, busiest rank':<38}{'ms':>10}{'share':>9}"]
    lines += [f"  {name:<36}{1e3 * seconds:>10.1f}{seconds / total:>9.1%}" for name, seconds in shown.items()]
    lines.append(f"  {'total':<36}{1e3 * total:>10.1f}{1:>9.0%}")
    return "\n".join(lines)


def _gains(outcome: Outcome) -> str:
    lines = [prediction_table(outcome.predictions, outcome)]
    if not outcome.predictions:
        lines.append(
            "drop.policy none drops nothing: set drop.policy or drop.granularity token, or compare all with "
            "--compare_policies"
        )
    config = outcome.setup.config
    freezes = config.drop.policy not in ("none", "staged") and dropped_update(config.drop) == "freeze"
    if freezes and config.parallel.overlap_param_gather:
        lines.append(
            "drop.dropped_update freeze: not counted: overlapped gathers of parameters leave dropped layers out"
        )
    proposals = {proposal.placement: proposal for proposal in outcome.proposals}
    lines += [_proposal(proposal, outcome) for proposal in proposals.values()]
    nothing = outcome.undropped_proposal
    if nothing is not None and (saved := 1.0 - nothing.prediction.iteration_s / outcome.baseline_s) > _WORTH_SAYING:
        layout = nothing.placement.layout
        lines.append(f"With nothing dropped, {layout} would save {saved:.1%} of an iteration.")
        if nothing.placement not in proposals:
            lines.append(_proposal(nothing, outcome))
    return "\n".join(lines)


def _own_prediction(outcome: Outcome) -> Prediction | None:
    """Of the config's drop section as it is; None if that drops nothing."""
    setup = outcome.setup
    found = (
        entry
        for entry in outcome.predictions
        if entry.layout == setup.placement.layout
        and (entry.sampler is None or entry.sampler.split()[0] == setup.config.drop.sampler)
    )
    return next(found, None)


def _stages(prediction: Prediction, outcome: Outcome) -> str:
    """A line for each stage of a run whose layers begin one after the other."""
    num_layers, ranks = outcome.setup.config.model.num_layers, outcome.setup.placement.num_ranks
    sampler = "" if prediction.sampler is None else f", sampler {prediction.sampler}"
    lines = [
        f"{prediction.policy}{sampler}, stage by stage",
        f"{'iterations':<19}{'layers':>8}{'keep_prob':>11}{'ideal':>9}{'gain':>9}{'+-':>6}{'imbalance':>11}"
        f"{'s/iter.':>9}{'hours':>9}" + (f"{'waiting':>9}" if ranks > 1 else ""),
    ]
    for stage in prediction.stages:
        lines.append(
            f"{f'{stage.first} - {stage.last}':<19}{f'{stage.begun_layers}/{num_layers}':>8}"
            f"{stage.mean_keep_prob:>11.3f}{stage.ideal_gain:>+9.1%}{_percent(stage.gain, '+'):>9}"
            f"{100 * stage.gain_stderr:>6.1f}{_percent(stage.lost_to_imbalance):>11}{stage.iteration_s:>9.3f}"
            f"{stage.hours:>9.1f}" + (f"{_percent(stage.waiting):>9}" if ranks > 1 else "")
        )
    if ranks > 1:
        lines.append("waiting: share of the passes' time in which a pipeline stage computes nothing")
    return "\n".join(lines)


def _proposal(proposal: Proposal, outcome: Outcome) -> str:
    """What a proposed placement needs of memory."""
    capacity, layout, worst = outcome.setup.hardware.memory_gb, proposal.placement.layout, proposal.worst
    needs = f"{worst.total:.1f} GB of {capacity:g} GB on stage {worst.rank}"
    if not proposal.fits:
        return f"NOT PROPOSED: {layout} would gain {proposal.prediction.gain:+.1%}, but needs {needs}"
    return f"{layout} needs at most {needs}" + (": DOES NOT FIT EITHER" if worst.total > capacity else "")


def prediction_table(predictions: Sequence[Prediction], outcome: Outcome) -> str:
    """A line for the undropped model and one for each prediction; layouts below where they differ."""
    layouts = list(dict.fromkeys([outcome.setup.placement.layout, *(entry.layout for entry in predictions)]))
    several = len(layouts) > 1
    header = (
        f"{'policy':<17}{'theta':>6} {'sampler':<12}{'keep_prob':>9}{'ideal':>8}{'gain':>8}{'+-':>6}"
        f"{'imbalance':>10}{'s/iter.':>9}{'hours':>9}{'GPU hours':>11}" + ("  layout" if several else "")
    )
    first = (
        f"{'undropped':<17}{'-':>6} {'-':<12}{1:>9.3f}{'-':>8}{'-':>8}{'-':>6}"
        f"{_percent(outcome.baseline_imbalance):>10}{outcome.baseline_s:>9.3f}{outcome.hours:>9.1f}"
        f"{outcome.hours * outcome.setup.gpus:>11,.0f}" + ("  A" if several else "")
    )
    lines = [header, first]
    for entry in predictions:
        theta = "-" if entry.theta is None else f"{entry.theta:.3g}"
        name = f"{entry.policy:<17}{theta:>6} {entry.sampler or '-':<12}"
        lines.append(
            (f"{'undropped':<17}{'-':>6} {'-':<12}" if entry.policy == "none" else name)
            + f"{entry.mean_keep_prob:>9.3f}{entry.ideal_gain:>+8.1%}{_percent(entry.gain, '+'):>8}"
            f"{100 * entry.gain_stderr:>6.1f}{_percent(entry.lost_to_imbalance):>10}{entry.iteration_s:>9.3f}"
            f"{entry.hours:>9.1f}{entry.gpu_hours:>11,.0f}"
            + (f"  {chr(ord('A') + layouts.index(entry.layout))}" if several else "")
        )
    if any(entry.stages and entry.policy != "staged" for entry in predictions):
        lines.append(f"{outcome.setup.config.drop.policy} drops among the layers that have begun (drop.stages)")
    if several:
        lines += [f"{chr(ord('A') + index)} = {layout}" for index, layout in enumerate(layouts)]
    return "\n".join(lines)


def _percent(share: float, sign: str = "") -> str:
    """A share in percent with a decimal, of which none is -0.0 %."""
    return f"{round(share, 3) + 0.0:{sign}.1%}"


def _memory(outcome: Outcome) -> str:
    capacity = outcome.setup.hardware.memory_gb
    drops = outcome.memory[0].dropped_activations is not None
    own = _own_prediction(outcome)
    stages = [] if own is None else own.stages
    lines = [
        f"{'memory, GB':<14}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'total':>8}"
        f"{'in flight':>11}"
        + (f"{'with drops':>12}" if drops else "")
        + "".join(f"{f'until {stage.last}':>15}" for stage in stages)
    ]
    for index, rank in enumerate(outcome.memory):
        alike = 0 < index < len(outcome.memory) - 1 and len(outcome.memory) > 8
        if not alike:
            lines.append(_memory_line(rank) + "".join(f"{stage.memory_gb[index]:>15.1f}" for stage in stages))
    worst = max(outcome.memory, key=lambda rank: rank.total)
    if worst.total > capacity:
        lines.append(f"DOES NOT FIT: stage {worst.rank} needs {worst.total:.1f} GB of {capacity:g} GB")
    elif worst.total > (1 - MARGIN) * capacity:
        lines.append(
            f"TIGHT: stage {worst.rank} needs {worst.total:.1f} GB of {capacity:g} GB, fragmentation and buffers apart"
        )
    else:
        lines.append(f"fits into {capacity:g} GB ({worst.total / capacity:.0%} at most)")
    return "\n".join(lines)


def _memory_line(rank: RankMemory) -> str:
    line = (
        f"{f'stage {rank.rank}':<14}{rank.weights:>9.1f}{rank.gradients:>11.1f}{rank.optimizer:>11.1f}"
        f"{rank.activations:>13.1f}{rank.total:>8.1f}{rank.in_flight:>11}"
    )
    if rank.dropped_activations is None:
        return line
    return line + f"{rank.with_drops:>12.1f}"


def _target(target: Target) -> str:
    entry = target.prediction
    lines = [
        f"for {target.target:+.1%}: "
        + ("" if target.reached else "NOT REACHED; closest is ")
        + f"drop.policy {entry.policy}, drop.theta {entry.theta:.4g}, which gains {entry.gain:+.1%} +- "
        f"{100 * entry.gain_stderr:.1f} (mean keep_prob {entry.mean_keep_prob:.3f})"
    ]
    if entry.policy == "sbld":
        lines.append(f"    drop.block_layers: {target.block_layers}\n    drop.allow_layers: {target.allow_layers}")
    if target.note:
        lines.append(f"({target.note})")
    return "\n".join(lines)
