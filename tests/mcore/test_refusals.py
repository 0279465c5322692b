"""Each switch that does not work with drops is refused by name, with the reason, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import make_switchable
from megatron_sbld.mcore.refusals import REASONS
from megatron_sbld.mcore.switchable import decoder_layers
from megatron_sbld.policy import LayerDropPolicy
from megatron_sbld.schedule import Constant
from tests.distributed.harness import model_parallel, single_process
from tests.helpers import tiny_config, tiny_gpt

ON: dict[str, list[Any]] = {
    "cuda_graph_impl": ["local", "transformer_engine"],
    "overlap_moe_expert_parallel_comm": [True],
    "fine_grained_activation_offloading": [True],
    "cpu_offloading": [True],
    "delay_wgrad_compute": [True],
    "fp8_recipe": ["delayed"],
    "qk_clip": [True],
    "log_max_attention_logit": [True],
    "moe_enable_routing_replay": [True],
    "experimental_attention_variant": ["gated_delta_net", "dsa"],
    "hybrid_context_parallel": [True],
    "num_microbatches_with_partial_activation_checkpoints": [1],
}


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with single_process(), model_parallel():
        yield


def half(**settings: Any) -> DropController:
    return DropController(LayerDropPolicy(Constant(0.5), 4), **settings)


def test_each_refused_switch_has_a_case_here() -> None:
    assert ON.keys() == REASONS.keys()


@pytest.mark.parametrize(("switch", "value"), [(switch, value) for switch in ON for value in ON[switch]])
def test_a_switch_that_would_make_a_drop_wrong_is_refused_by_name(switch: str, value: object) -> None:
    (chunk,) = tiny_gpt(tiny_config())
    if switch == "fp8_recipe":
        chunk.config.fp8 = "hybrid"
    setattr(chunk.config, switch, value)
    with pytest.raises(ValueError) as raised:
        make_switchable(chunk, half())
    assert str(raised.value) == (
        f"{switch} = {value!r} does not work with layer dropping: {REASONS[switch]}; switch it off"
    )
    assert type(next(decoder_layers(chunk))) is TransformerLayer  # refused before anything was changed


def test_fp8_delayed_scaling_is_refused_only_when_fp8_is_on() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    assert chunk.config.fp8_recipe == "delayed"  # Megatron's default
    make_switchable(chunk, half())


def test_fp8_with_full_recomputation_is_refused_for_decisions_per_microbatch() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    chunk.config.fp8, chunk.config.fp8_recipe = "hybrid", "tensorwise"
    chunk.config.recompute_granularity = "full"
    with pytest.raises(ValueError, match=r"decisions per microbatch do not work with fp8 .* use decision scope"):
        make_switchable(chunk, half(scope="microbatch"))
    make_switchable(chunk, half(scope="iteration"))


@pytest.mark.parametrize("cls", [FullyShardedDataParallel, TorchFullyShardedDataParallel])
def test_sharded_wrappers_are_refused_by_name_before_and_after(cls: type[torch.nn.Module]) -> None:
    message = f"{cls.__name__} does not work with layer dropping; wrap the model in"
    (chunk,) = tiny_gpt(tiny_config())
    wrapper = cls.__new__(cls)
    torch.nn.Module.__init__(wrapper)
    wrapper.module = chunk
    with pytest.raises(ValueError, match=message):
        make_switchable(wrapper, half())
    make_switchable(chunk, half())
    with pytest.raises(ValueError, match=message):
        wrapper.module = chunk


def test_layers_with_cross_attention_are_refused_by_number() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    chunk.decoder.layers[2].cross_attention = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layer 3 has cross-attention, and only decoder-only models"):
        make_switchable(chunk, half())


def test_layers_of_another_kind_are_refused_by_name() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    chunk.decoder.layers[1] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a decoder layer is a Linear; only TransformerLayer can be made switchable"):
        make_switchable(chunk, half())
