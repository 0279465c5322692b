"""HybridModel's layers of every kind as Megatron's own spec builds them: dropped ones leave the shorter model.

Needs a GPU, Transformer Engine, mamba-ssm and flash-linear-attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_sbld.controller import DropController
from megatron_sbld.layout.units import num_units
from megatron_sbld.mcore import make_switchable
from megatron_sbld.method.policy import FullDepthPolicy
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import Listed, global_name, tiny_config, train, wrap_ddp
from tests.mcore.hybrid import tiny_hybrid

pytestmark = pytest.mark.gpu

PATTERN = "M*-G*EM"
CONFIG: dict[str, Any] = {
    **{"num_layers": len(PATTERN), "hidden_size": 256, "params_dtype": torch.bfloat16, "bf16": True},
    **{"num_moe_experts": 8, "moe_router_topk": 2, "moe_grouped_gemm": True, "add_bias_linear": False},
    **{"normalization": "RMSNorm", "mamba_num_groups": 8, "mamba_state_dim": 64},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
}


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    for name in ("transformer_engine.pytorch", "mamba_ssm", "fla"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    with single_process(), model_parallel():
        yield


def hybrid(pattern: str, blocks: Any = None) -> Any:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    (chunk,) = tiny_hybrid(
        tiny_config(**{**CONFIG, "num_layers": len(pattern)}), pattern, blocks=blocks, spec=hybrid_stack_spec
    )
    return chunk.bfloat16()


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_nothing_dropped_is_stock_bit_for_bit(unit: Any) -> None:
    losses = []
    for switchable in (False, True):
        chunk = hybrid(PATTERN)
        controller = DropController(FullDepthPolicy(num_units(PATTERN, unit)))
        if switchable:
            make_switchable(chunk, controller, unit=unit)
        losses.append(train(wrap_ddp([chunk]), before_iteration=controller.begin_iteration if switchable else None))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kept", ["0111111", "1001111", "1110111", "1111001", "1111110"])
def test_dropped_layers_leave_the_model_without_them(kept: str) -> None:
    names = range(1, len(PATTERN) + 1)
    remaining = [number for number in names if kept[number - 1] == "1"]
    whole, short = hybrid(PATTERN, names), hybrid("".join(PATTERN[number - 1] for number in remaining), remaining)
    controller = DropController(Listed(*map(float, kept)))
    make_switchable(whole, controller)
    controller.begin_iteration(1, 1)
    found = []
    for chunk in (whole, short):
        tokens = torch.arange(32, device="cuda").view(2, 16)
        loss = chunk(tokens, torch.arange(16, device="cuda").expand(2, -1), None, labels=tokens + 1)
        loss.sum().backward()
        found.append({global_name(chunk, name): param.grad for name, param in chunk.named_parameters()})
        found[-1]["loss"] = loss
    for name, value in found[0].items():
        if name in found[1]:
            torch.testing.assert_close(value, found[1][name])
        else:
            assert value is None, name
