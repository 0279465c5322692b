"""Settings that do not work together: a row each, for the trainer, the patches of Megatron-LM and make_switchable.

Whoever asks hands over the settings that it knows, by the names of the drop section's fields and of Megatron's
switches, and says what its own users call them. A row applies when all of its settings are known and are what it says;
with policy none nothing of the drop section is handed over. What only the trainer knows: config/combinations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Combination:
    """A row: what it is about, why it does not work, and what to do instead."""

    when: Mapping[str, Any]
    """Each setting's value, or a function that says of its value whether the row is about it."""
    why: str
    instead: str
    """{name} stands for what the user calls a setting."""
    programs: tuple[str, ...] = ()
    """Where alone it does not work; () is everywhere."""


def given(value: Any) -> bool:
    """Whether a setting has been made."""
    return value is not None


def switched_on(value: Any) -> bool:
    """Whether a switch is on, a path given or a number above 0."""
    return bool(value)


def above_one(value: Any) -> bool:
    """Whether something is split."""
    return value is not None and value > 1


def other_than(usual: Any) -> Callable[[Any], bool]:
    """Whether a setting has another value."""
    return lambda value: value != usual


def _is_global_aux_loss(value: Any) -> bool:
    return value is not None and "global_aux_loss" in value  # one name, or a list of them


def _distinct_layers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Data-parallel replicas run different layers, and `settings`."""
    return {"replicas": "distinct", **settings, "granularity": other_than("sample")}


def _keeps_stepping(value: Any) -> bool:
    return value not in (None, "adam", "sgd")


COMBINATIONS = (
    Combination(
        _distinct_layers({"sampler": "bernoulli"}),
        "replicas would run different numbers of layers, and wait for each other",
        "set {sampler} balanced, {granularity} sample or {replicas} shared",
    ),
    Combination(
        _distinct_layers({"overlap_grad_reduce": True}),
        "a replica that skips a layer would start its reductions in another order than one that runs it",
        "set {replicas} shared, or switch {overlap_grad_reduce} off",
    ),
    Combination(
        _distinct_layers({"dropped_update": "freeze"}),
        "no replica knows whether all replicas dropped a layer",
        "set {replicas} shared, or {dropped_update} apply",
    ),
    Combination(
        {"replicas": "distinct", "sensitivity_update": "dynamic"},
        "the loss is a mean over replicas, which took different decisions",
        "set {replicas} shared",
    ),
    Combination(
        {"replicas": "distinct", "micro_batch_size": 1, "granularity": "sample"},
        "with one sample there is nothing that replicas could choose differently",
        "set {micro_batch_size} to 2 at least, or {replicas} shared",
    ),
    Combination(
        _distinct_layers({"expert_model_parallel_size": above_one, "num_moe_experts": given}),
        "replicas exchange tokens inside a layer, so all must run it or none",
        "set {replicas} shared",
    ),
    Combination(
        _distinct_layers({"moe_router_load_balancing_type": _is_global_aux_loss, "num_moe_experts": given}),
        "replicas count tokens together inside a layer, so all must run it or none",
        "set {replicas} shared",
    ),
    Combination(
        {"granularity": "sample", "moe_router_load_balancing_type": _is_global_aux_loss, "num_moe_experts": given},
        "it averages counts of tokens over passes as if all had as many",
        "set {granularity} layer",
    ),
    Combination(
        {"granularity": "sample", "tp_comm_overlap": True},
        "its buffers have room for whole microbatches alone",
        "set {granularity} layer",
    ),
    Combination(
        {"granularity": "token", "moe_router_load_balancing_type": _is_global_aux_loss, "num_moe_experts": given},
        "it averages counts of tokens over passes as if all had as many",
        "set {granularity} layer",
    ),
    Combination(
        {"granularity": "token", "tp_comm_overlap": True},
        "its buffers have room for whole samples alone",
        "set {granularity} layer",
    ),
    Combination(
        {"granularity": "token", "apply_rope_fusion": True},
        "its kernel takes one position for all samples, and each sample has its own tokens",
        "switch {apply_rope_fusion} off",
    ),
    Combination(
        {"granularity": "token", "multi_latent_attention": True},
        "it makes its rotary embeddings inside of attention, where nothing says which tokens these are",
        "set {granularity} layer",
    ),
    Combination(
        {"granularity": "token", "window_size": given},
        "a window would count the tokens that are left, not those of the sequence",
        "set {granularity} layer",
    ),
    Combination(
        {"granularity": "token", "torch_compile": True},
        "each number of tokens would be compiled anew",
        "set {granularity} layer, or {torch_compile} false",
    ),
    Combination(
        {"granularity": "sample", "sensitivity_update": "dynamic"},
        "a layer runs nearly the same share of every microbatch, so that losses say nothing about it",
        "set {granularity} layer",
    ),
    Combination(
        {"sensitivity_update": "dynamic", "decision_scope": "microbatch"},
        "it reports one loss an iteration",
        "set {decision_scope} iteration",
        programs=("Megatron-LM", "Megatron-Bridge"),
    ),
    Combination(
        {"policy": other_than("none"), "optimizer": _keeps_stepping},
        "a dropped layer's gradient is zero, and its momentum would still move it by a whole step",
        "set {optimizer} adam or sgd",
    ),
    Combination(
        {"policy": other_than("none"), "use_layer_wise_distributed_optimizer": True},
        "whether its ranks step and gather what a drop leaves alone has not been tested",
        "switch {use_layer_wise_distributed_optimizer} off",
    ),
    *(
        Combination(
            {**frozen, "optimizer_cuda_graph": True},
            "a captured step would freeze the layers that it was captured with",
            instead,
        )
        for frozen, instead in (
            ({"dropped_update": "freeze"}, "set {dropped_update} apply, or switch {optimizer_cuda_graph} off"),
            ({"stages": given}, "leave {stages} out, or switch {optimizer_cuda_graph} off"),
        )
    ),
    Combination(
        {"depth": other_than("uniform"), "policy": other_than("layerdrop")},
        "the other policies have a depth of their own",
        "set {depth} uniform, or {policy} layerdrop",
    ),
    Combination(
        {"stage_copy_moments": True, "stage_init": other_than("copy")},
        "there is no layer to copy moments from",
        "set {stage_init} copy, or {stage_copy_moments} false",
    ),
    Combination(
        {"balance_stages": given, "sampler": "bernoulli"},
        "the balanced sampler alone balances stages",
        "set {sampler} balanced, or leave {balance_stages} out",
    ),
    *(
        Combination(
            {**by_microbatch, narrow: switched_on, "recompute_granularity": "full"},
            "Transformer Engine's recomputation does not tell its passes apart",
            instead,
        )
        for narrow in ("fp8", "fp4")
        for by_microbatch, instead in (
            ({"decision_scope": "microbatch"}, "set {decision_scope} iteration"),
            ({"granularity": "token"}, "set {granularity} layer"),
        )
    ),
    Combination(
        {"torch_compile": True, "residual": "fused", "residual_scale": "inverse_keep_prob"},
        "each scale would be compiled anew",
        "set {residual} stock, or {residual_scale} none (PLD's own is inverse_keep_prob)",
    ),
)


def find_refusals(
    settings: Mapping[str, Any],
    named: Callable[[str], str] = str,
    *,
    rows: Iterable[Combination] = COMBINATIONS,
    program: str | None = None,
) -> list[str]:
    """A line for each row that applies: the settings with their values, the reason and what is allowed.

    settings: what is known, by the names that the rows use.
    named: what the user calls a setting.
    program: the training program, where it is another one than the trainer.
    """
    return [
        _message(row, settings, named, program)
        for row in rows
        if (not row.programs or program in row.programs) and _holds(row, settings)
    ]


def refuse_combinations(
    settings: Mapping[str, Any], named: Callable[[str], str] = str, *, program: str | None = None
) -> None:
    """Raise ValueError if anything in `settings` does not work together; the arguments are `find_refusals`'."""
    found = find_refusals(settings, named, program=program)
    if found:
        raise ValueError("\n".join(found))


def _holds(row: Combination, settings: Mapping[str, Any]) -> bool:
    return all(
        name in settings and (wanted(settings[name]) if callable(wanted) else settings[name] == wanted)
        for name, wanted in row.when.items()
    )


def _message(row: Combination, settings: Mapping[str, Any], named: Callable[[str], str], program: str | None) -> str:
    first, *others = (f"{named(name)} = {settings[name]!r}" for name in row.when)
    place = f" in {program}" if row.programs else ""
    instead = row.instead.format_map(_Names(named))
    return f"{first} does not work with {' and '.join(others)}{place}: {row.why}; {instead}"


class _Names(dict[str, str]):
    def __init__(self, named: Callable[[str], str]) -> None:
        super().__init__()
        self._named = named

    def __missing__(self, name: str) -> str:
        return self._named(name)
