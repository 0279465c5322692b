"""Each switch that does not work with drops is refused by name, with the reason, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.torch_fully_sharded_data_parallel import TorchFullyShardedDataParallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import fully_shard

from megatron_sbld.controller import DropController
from megatron_sbld.mcore import make_switchable
from megatron_sbld.mcore.skip import layer_buckets as ddp
from megatron_sbld.mcore.skip.refusals import REASONS, is_refused_wrapper, refuse_wrapped_layers
from megatron_sbld.mcore.skip.switchable import decoder_layers
from megatron_sbld.method.policy import LayerDropPolicy
from megatron_sbld.method.schedule import Constant
from tests.harness import model_parallel, single_process
from tests.mcore.helpers import SEQUENCE, Listed, tiny_config, tiny_gpt, wrap_ddp

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
    "use_kitchen": [True],
    "use_kitchen_attention": [True],
    "enable_mhc_connections": [True],
    "enable_hyper_connections": [True],
    "tensor_parallel_num_weight_shards": [2],
    "expert_tensor_parallel_num_weight_shards": [4],
    "gtp_weight_remat_size": [2],
    "expert_gtp_weight_remat_size": [2],
    "moe_router_load_balancing_type": ["quantile_balancing", ["quantile_balancing"]],
    "moe_paged_stash": [True],
    "overlap_dispatch_backward_with_experts_wgrad": [True],
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


def test_weights_are_sharded_only_beyond_tensor_parallelism() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    chunk.config.tensor_model_parallel_size = 2
    chunk.config.tensor_parallel_num_weight_shards = 2  # what megatron-core makes of None
    chunk.config.expert_tensor_parallel_num_weight_shards = 1
    chunk.config.gtp_weight_remat_size = 1
    make_switchable(chunk, half())


@pytest.mark.parametrize(("precision", "value"), [("fp8", "hybrid"), ("fp4", "e2m1")])
def test_fp8_with_full_recomputation_is_refused_for_decisions_per_microbatch(precision: str, value: str) -> None:
    (chunk,) = tiny_gpt(tiny_config())
    chunk.config.fp8_recipe = "tensorwise"
    setattr(chunk.config, precision, value)
    chunk.config.recompute_granularity = "full"
    with pytest.raises(
        ValueError, match=rf"scope = 'microbatch' does not work with {precision} .* set scope iteration"
    ):
        make_switchable(chunk, half(scope="microbatch"))
    make_switchable(chunk, half(scope="iteration"))


def unbuilt(cls: type[torch.nn.Module]) -> torch.nn.Module:
    """A wrapper without what its constructor needs."""
    wrapper = cls.__new__(cls)
    torch.nn.Module.__init__(wrapper)
    return wrapper


class DeepSpeedEngine(torch.nn.Module):
    """Stands for DeepSpeed's, which is not installed."""

    __module__ = "deepspeed.runtime.engine"


class PipelineEngine(DeepSpeedEngine):
    """One of DeepSpeed's subclasses."""


WRAPPER_CLASSES = [
    torch.nn.parallel.DistributedDataParallel,
    torch.nn.DataParallel,
    FSDP1,
    FullyShardedDataParallel,
    TorchFullyShardedDataParallel,
    PipelineEngine,
]


@pytest.mark.parametrize("cls", WRAPPER_CLASSES)
def test_wrappers_that_own_gradients_are_refused_by_name_before_and_after(cls: type[torch.nn.Module]) -> None:
    message = rf"{cls.__name__} does not work with layer dropping: .*; wrap the model in megatron\.core"
    (chunk,) = tiny_gpt(tiny_config())
    name = "_fsdp_wrapped_module" if cls is FSDP1 else "module"
    wrapper = unbuilt(cls)
    wrapper._modules[name] = chunk
    with pytest.raises(ValueError, match=message):
        make_switchable(wrapper, half())
    make_switchable(chunk, half())
    later = unbuilt(cls)
    with pytest.raises(ValueError, match=message):
        setattr(later, name, chunk)


def test_each_wrapper_is_named_in_the_table_and_has_a_reason() -> None:
    assert {is_refused_wrapper(unbuilt(cls)) for cls in WRAPPER_CLASSES} == {True}
    assert not is_refused_wrapper(unbuilt(DistributedDataParallel))  # Megatron's


def test_torchs_data_parallel_is_refused_whenever_it_is_put_around_a_model() -> None:
    message = "torch.nn.parallel.distributed.DistributedDataParallel does not work with layer dropping"
    (chunk,) = tiny_gpt(tiny_config())
    wrapper = torch.nn.parallel.DistributedDataParallel(chunk)
    with pytest.raises(ValueError, match=message):
        make_switchable(wrapper, half())
    with pytest.raises(ValueError, match=message):
        make_switchable(chunk, half())  # the wrapper is around it
    del wrapper
    make_switchable(chunk, half())  # the wrapper is gone
    with pytest.raises(ValueError, match=message):
        torch.nn.parallel.DistributedDataParallel(chunk)


def test_torchs_data_parallel_that_was_built_unseen_is_refused_before_the_first_skip() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    wrapper = torch.nn.parallel.DistributedDataParallel(chunk)
    ddp._refused_wrappers.discard(wrapper)  # as if this package had been imported after it
    controller = DropController(Listed(1, 0, 1, 1))
    make_switchable(chunk, controller)
    controller.begin_iteration(1, 1)
    tokens = torch.zeros(2, SEQUENCE, dtype=torch.long)
    with pytest.raises(ValueError, match="DistributedDataParallel does not work with layer dropping"):
        wrapper(tokens, torch.arange(SEQUENCE).expand(2, -1), None)


def test_fully_sharded_layers_are_refused_before_and_after() -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    (chunk,) = tiny_gpt(tiny_config())
    controller = half()
    make_switchable(chunk, controller)
    fully_shard(chunk, mesh=mesh)
    message = r"(FSDP\w+|DTensor parameters \(fully_shard\)) does not work with layer dropping"
    with pytest.raises(ValueError, match=message):
        controller.begin_iteration(1, 1)
    with pytest.raises(ValueError, match=message):
        make_switchable(chunk, half())
    with pytest.raises(ValueError, match=message):  # of a part, whose owner is elsewhere
        refuse_wrapped_layers(torch.nn.Module(), chunk.decoder.layers)


def test_a_compiled_model_is_refused_before_and_after_and_a_compiled_part_of_a_layer_is_not() -> None:
    message = "decisions would become part of a compiled graph"
    (chunk,) = tiny_gpt(tiny_config())
    with pytest.raises(ValueError, match=f"OptimizedModule does not work with layer dropping: {message}"):
        make_switchable(torch.compile(chunk, backend="eager"), half())
    (chunk,) = tiny_gpt(tiny_config())
    chunk.decoder.layers[0].mlp = torch.compile(chunk.decoder.layers[0].mlp, backend="eager")
    controller = half()
    make_switchable(chunk, controller)
    controller.begin_iteration(1, 1)
    with pytest.raises(ValueError, match=message):
        torch.compile(chunk, backend="eager")
    chunk.compile(backend="eager")
    with pytest.raises(ValueError, match=rf"compile\(\) of a GPTModel does not work with layer dropping: {message}"):
        make_switchable(chunk, controller)


def test_a_model_that_is_wrapped_again_reports_to_the_newer_wrapper() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    controller = DropController(Listed(1, 0, 1, 1))
    make_switchable(chunk, controller)
    controller.begin_iteration(1, 1)
    chunk.train()(torch.zeros(2, SEQUENCE, dtype=torch.long), torch.arange(SEQUENCE).expand(2, -1), None)
    layer = chunk.decoder.layers[1]
    assert layer._drop_buckets.wrapper is None  # not wrapped when it was skipped first
    for _ in range(2):
        (wrapper,) = wrap_ddp([chunk], overlap_grad_reduce=True)
        wrapper(torch.zeros(2, SEQUENCE, dtype=torch.long), torch.arange(SEQUENCE).expand(2, -1), None)
        assert layer._drop_buckets.wrapper is wrapper


def test_layers_with_cross_attention_are_refused_by_number() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    chunk.decoder.layers[2].cross_attention = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="layer 3 has cross-attention, and only decoder-only models"):
        make_switchable(chunk, half())


def test_layers_of_another_kind_are_refused_by_name() -> None:
    (chunk,) = tiny_gpt(tiny_config())
    chunk.decoder.layers[1] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a decoder layer is a Linear; only TransformerLayer and MambaLayer can"):
        make_switchable(chunk, half())
