"""No public function takes an unknown choice for a known one, a text for a truth value, or a float for a count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sbld.controller import DropController
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig
from megatron_sbld.method.decisions import draw_plan, draw_sample_counts, draw_samples, replicas_run_alike
from megatron_sbld.method.policy import FullDepthPolicy, LayerDropPolicy, PLDPolicy, SBLDPolicy, StochasticDepthPolicy
from megatron_sbld.method.schedule import Constant
from megatron_sbld.residual import residual_skip_add, residual_skip_add_
from megatron_sbld.sensitivity.dynamic import GapEstimator

HALF = Constant(0.5)
FULL_DEPTH = FullDepthPolicy(4)
PROBS, COUNTS, ZEROS = [0.5] * 4, np.ones((2, 4), dtype=np.int64), torch.zeros(1, 1, 2)


def begun(iteration: Any, num_microbatches: Any) -> None:
    DropController(FULL_DEPTH).begin_iteration(iteration, num_microbatches)


def samples(**options: Any) -> None:
    DropController(FULL_DEPTH, **{"granularity": "sample", "num_samples": 2, **options})


def balanced(**options: Any) -> None:
    DropController(FULL_DEPTH, **{"sampler": "balanced", **options})


def exported(**options: Any) -> None:
    from megatron_sbld.hf.export_model import export_hf

    export_hf("checkpoint", "out", **options)


def imported(**options: Any) -> None:
    from megatron_sbld.hf.import_model import import_hf

    import_hf("source", "out", **options)


def model_options(**options: Any) -> None:
    from megatron_sbld.evaluation.model import ModelOptions

    ModelOptions(**options)


def passages(passage_format: Any) -> None:
    from megatron_sbld.evaluation.passages import read_passages

    read_passages(__file__, passage_format)


def texts(text_format: Any) -> None:
    from megatron_sbld.evaluation.texts import read_texts

    read_texts([__file__], None, text_format)  # type: ignore[arg-type]


def layers_of(transformer_impl: Any) -> None:
    from megatron_sbld.mcore.local.layer_specs import choose_transformer_impl

    choose_transformer_impl(transformer_impl)


def norm(normalization: Any) -> None:
    from megatron_sbld.mcore.local.norm import norm_class

    norm_class(normalization)


def setup(attention: Any) -> None:
    from megatron_sbld.config.sections import Config
    from megatron_sbld.layout.placement import even_placement
    from megatron_sbld.predict.hardware import KNOWN
    from megatron_sbld.predict.iteration import Setup

    Setup(
        config=Config(),
        vocab_size=256,
        hardware=next(iter(KNOWN.values())),
        gpus=8,
        attention=attention,
        placement=even_placement(4, 1),
    )


def section(**options: Any) -> None:
    build_policy(DropConfig(**{"policy": "layerdrop", **options}), 4, 100)


CASES: dict[str, tuple[Callable[..., Any], dict[str, list[Any]]]] = {
    "DropController": (
        lambda **given: DropController(FULL_DEPTH, **given),
        {
            "seed": ["1", 1.0, -1, True, 2**63],
            "scope": ["nonsense", "iterations", None, True],
            "sampler": ["nonsense", "Bernoulli", None],
            "granularity": ["nonsense", "samples", None],
            "replicas": ["nonsense", "share", None],
            "residual_scale": ["nonsense", "", False, "inverse"],
            "window": ["64", 64.0, 0, True],
            "replica": ["0", 0.0, -1],
        },
    ),
    "DropController, samples": (samples, {"num_samples": ["2", 2.0, 0, None, True], "replicas": ["nonsense"]}),
    "DropController, balanced": (balanced, {"stages": ["2", 2.0, 3, 0, [[1, 2]], [1, 2]], "replica": ["1", 2**24]}),
    "begin_iteration": (
        lambda **given: begun(**{"iteration": 1, "num_microbatches": 1, **given}),
        {"iteration": ["1", 1.0, 0, True, None], "num_microbatches": ["1", 1.0, 0, True]},
    ),
    "draw_plan": (
        lambda **given: draw_plan(**{"keep_probs": PROBS, "seed": 1, "iteration": 1, "num_microbatches": 2, **given}),
        {
            "scope": ["nonsense", None],
            "sampler": ["nonsense", None],
            "seed": ["1", 1.0],
            "iteration": ["1", 1.0],
            "num_microbatches": ["2", 2.0],
            "replica": ["0", 0.0],
            "keep_probs": [[2.0], [[0.5]]],
        },
    ),
    "draw_sample_counts": (
        lambda **given: draw_sample_counts(
            **{"keep_probs": PROBS, "num_samples": 2, "seed": 1, "iteration": 1, "num_microbatches": 2, **given}
        ),
        {"scope": ["nonsense"], "sampler": ["nonsense"], "num_samples": ["2", 2.0]},
    ),
    "draw_samples": (
        lambda **given: draw_samples(**{"counts": COUNTS, "num_samples": 2, "seed": 1, "iteration": 1, **given}),
        {
            "scope": ["nonsense", None],
            "num_samples": ["2", 2.0],
            "seed": ["1", 1.0],
            "iteration": [1.0],
            "replica": [0.0],
        },
    ),
    "replicas_run_alike": (
        lambda **given: replicas_run_alike(**{"replicas": "shared", "granularity": "layer", **given}),
        {"replicas": ["nonsense", None], "granularity": ["nonsense", None]},
    ),
    **{
        policy.__name__: (
            lambda policy=policy, **given: policy(HALF, **{"num_layers": 4, **given}),
            {
                "num_layers": ["4", 4.0, True],
                "residual_scale": ["nonsense", "", False],
                "recovery_fraction": ["0.1", True],
            },
        )
        for policy in (PLDPolicy, LayerDropPolicy, StochasticDepthPolicy)
    },
    "SBLDPolicy": (
        lambda **given: SBLDPolicy(HALF, PROBS, **given),
        {
            "residual_scale": ["nonsense", False],
            "explore_block": ["false", 0, None],
            "exploration": ["0.1", False],
            "alpha": ["1", True],
            "block_layers": ["1", ["1"], [1.0], [True]],
            "allow_layers": ["1", [1.0]],
        },
    ),
    "drop section": (
        section,
        {
            "policy": ["nonsense"],
            "schedule": ["nonsense"],
            "residual_scale": ["nonsense"],
            "sampler": ["nonsense"],
            "release_block": ["false"],
            "interpolate": ["false"],
            "decision_scope": ["nonsense"],
            "dropped_update": ["nonsense"],
            "theta": ["0.5"],
            "seed": ["1", 1.0],
        },
    ),
    "GapEstimator": (
        lambda **given: GapEstimator(**{"num_layers": 4, **given}),
        {"num_layers": ["4", 4.0], "memory": ["10"], "prior_std": ["1"]},
    ),
    "residual_skip_add": (
        lambda **given: residual_skip_add(ZEROS, ZEROS, **given),
        {"training": ["false", 0, None], "dim": ["0", 2]},
    ),
    "residual_skip_add_": (
        lambda **given: residual_skip_add_(ZEROS, ZEROS.clone(), **given),
        {"training": ["false", 0, None], "dim": ["0", 2]},
    ),
    "export_hf": (exported, {"dtype": ["nonsense", "float32", None]}),
    "import_hf": (imported, {"precision": ["nonsense", "as-saved"], "pad_vocab_to_multiple_of": ["16", 16.0, 0]}),
    "ModelOptions": (model_options, {"precision": ["nonsense", "float32"], "sequence_parallel": ["false", 0]}),
    "read_passages": (passages, {"passage_format": ["nonsense", None]}),
    "read_texts": (texts, {"text_format": ["nonsense", None]}),
    "choose_transformer_impl": (layers_of, {"transformer_impl": ["nonsense", None]}),
    "norm_class": (norm, {"normalization": ["nonsense", None]}),
    "Setup": (setup, {"attention": ["nonsense", None]}),
}


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        pytest.param(function, name, value, id=f"{title} {name} {value!r}")
        for title, (function, arguments) in CASES.items()
        for name, values in arguments.items()
        for value in values
    ],
)
def test_a_value_outside_of_what_is_allowed_is_refused_by_name(
    function: Callable[..., Any], name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=name.removesuffix("s").rsplit("_", 1)[-1]):
        function(**{name: value})
