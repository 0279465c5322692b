"""megatron-core on gloo, with nothing dropped: every layout trains as one process does, by losses and gradient norms.

This is what the stand-ins, the attention under context parallelism and the norms under sequence parallelism are for.
One start of two processes runs all cases; four processes are for layouts that need them.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType

from megatron_sbld.mcore.compat import batch_on_this_cp_rank
from megatron_sbld.mcore.local.attention import SDPACoreAttention
from tests.harness import model_parallel, run_distributed, single_process
from tests.mcore.helpers import Step, tiny_config, tiny_gpt, train

pytestmark = pytest.mark.slow

LLAMA = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "num_query_groups": 2,
}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}
FP16 = {"fp16": True, "params_dtype": torch.float16}
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
DISTRIBUTED_OPTIMIZER = {"use_distributed_optimizer": True}
OVERLAPS = {**DISTRIBUTED_OPTIMIZER, "overlap_grad_reduce": True, "overlap_param_gather": True}


@dataclass(frozen=True)
class Case:
    """A layout and how it is trained; `reference` are the settings that one process trains with for comparison."""

    layout: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5


TWO_PROCESSES = {
    "tensor": Case({"tp": 2}),
    "tensor, sequence parallel": Case({"tp": 2}, {"sequence_parallel": True}),
    "pipeline": Case({"pp": 2}),
    "interleaved pipeline": Case({"pp": 2, "vpp": 2}),
    "data": Case(),
    "distributed optimizer": Case(ddp=DISTRIBUTED_OPTIMIZER),
    "distributed optimizer, both overlaps": Case(ddp=OVERLAPS),
    "context": Case({"cp": 2}),
    "context, rotary embedding": Case({"cp": 2}, model={"position_embedding_type": "rope"}),
    "full recomputation, interleaved": Case({"pp": 2, "vpp": 2}, FULL_RECOMPUTE),
    "selective recomputation, tensor": Case({"tp": 2}, SELECTIVE_RECOMPUTE),
    "bf16, pipeline": Case({"pp": 2}, BF16, reference=BF16, tolerance=1e-2),
    "bf16, distributed optimizer, both overlaps": Case({}, BF16, OVERLAPS, reference=BF16, tolerance=1e-2),
    "fp16, tensor": Case({"tp": 2}, FP16, reference=FP16, tolerance=1e-2),
    "llama, sequence parallel": Case(
        {"tp": 2}, {**LLAMA, "sequence_parallel": True}, model={"position_embedding_type": "rope"}, reference=LLAMA
    ),
    "llama, context": Case({"cp": 2}, LLAMA, model={"position_embedding_type": "rope"}, reference=LLAMA),
    "untied embeddings, pipeline": Case({"pp": 2}, model={"tied": False}),
}
FOUR_PROCESSES = {
    "pipeline of four": Case({"pp": 4}),
    "tensor x pipeline, sequence parallel": Case({"tp": 2, "pp": 2}, {"sequence_parallel": True}),
    "tensor x context": Case({"tp": 2, "cp": 2}, {"sequence_parallel": True}),
    "context of four": Case({"cp": 4}),
    "interleaved x data, both overlaps": Case({"pp": 2, "vpp": 2}, ddp=OVERLAPS),
}


def _train(case: Case) -> list[Step]:
    return train(tiny_gpt(tiny_config(**case.config), **case.model), ddp=case.ddp)


def _train_all(cases: dict[str, Case]) -> dict[str, list[Step]]:
    results = {}
    for name, case in cases.items():
        with model_parallel(**case.layout):
            results[name] = _train(case)
    return results


def _train_alone(cases: dict[str, Case]) -> dict[str, list[Step]]:
    """What each case is compared with: this process alone, without parallelism, recomputation or overlap."""
    with single_process(), model_parallel():
        return {name: _train(Case(config=case.reference, model=case.model)) for name, case in cases.items()}


def _assert_all_ranks_agree_with_one_process(cases: dict[str, Case], ranks: list[dict[str, list[Step]]]) -> None:
    for name, expected in _train_alone(cases).items():
        for rank, results in enumerate(ranks):
            for quantity in ("loss", "grad_norm"):
                actual = [getattr(step, quantity) for step in results[name]]
                wanted = [getattr(step, quantity) for step in expected]
                assert actual == pytest.approx(wanted, rel=cases[name].tolerance), f"{name}, rank {rank}: {quantity}"


def _context_parallel_attention() -> dict[str, Any]:
    """Whether this rank's output and gradients of context-parallel attention are slices of the whole attention's."""
    arguments = (1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn((16, 2, n, 8), generator=generator) for n in (4, 2, 2)]  # query, key, value [s, b, heads, d]
    direction = torch.randn((16, 2, 32), generator=generator)

    with model_parallel(cp=2):
        with_cp = SDPACoreAttention(tiny_config(num_query_groups=2), *arguments)
        group = parallel_state.get_context_parallel_group()

        def local(tensor: torch.Tensor) -> torch.Tensor:
            by_batch = {"tensor": tensor.transpose(0, 1).contiguous()}
            return batch_on_this_cp_rank(by_batch, group)["tensor"].transpose(0, 1)

        masked = torch.ones(16, 16).tril().logical_not()[None, None]
        local_mask = batch_on_this_cp_rank({"attention_mask": masked}, group)["attention_mask"]
        parts = [local(x).requires_grad_() for x in whole]
        actual = _output_and_gradients(with_cp, parts, local(direction), None)
        actual_masked = _output_and_gradients(with_cp, parts, local(direction), local_mask)
    with model_parallel():
        without_cp = SDPACoreAttention(tiny_config(num_query_groups=2), *arguments)
        leaves = [x.requires_grad_() for x in whole]
        expected = [local(x) for x in _output_and_gradients(without_cp, leaves, direction, None)]
    return {"actual": actual, "with an explicit mask": actual_masked, "expected": expected}


def _output_and_gradients(
    attention: torch.nn.Module, inputs: list[torch.Tensor], direction: torch.Tensor, mask: torch.Tensor | None
) -> list[torch.Tensor]:
    output = attention(*inputs, mask)
    gradients = torch.autograd.grad((output * direction).sum(), inputs)
    return [x.detach() for x in (output, *gradients)]


def _two_processes() -> dict[str, Any]:
    return {"training": _train_all(TWO_PROCESSES), "attention": _context_parallel_attention()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_distributed(_two_processes, 2)


def test_two_processes_train_as_one_on_every_layout(two_ranks: list[dict[str, Any]]) -> None:
    _assert_all_ranks_agree_with_one_process(TWO_PROCESSES, [rank["training"] for rank in two_ranks])


@pytest.mark.parametrize("masked", ["actual", "with an explicit mask"])
def test_context_parallel_attention_is_a_slice_of_the_whole(two_ranks: list[dict[str, Any]], masked: str) -> None:
    for rank in two_ranks:
        torch.testing.assert_close(rank["attention"][masked], rank["attention"]["expected"], rtol=1e-5, atol=1e-5)


def test_four_processes_train_as_one_on_every_layout() -> None:
    ranks = run_distributed(_train_all, 4, FOUR_PROCESSES, timeout=300)
    _assert_all_ranks_agree_with_one_process(FOUR_PROCESSES, ranks)


def _fail_on_rank_1() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("this rank is broken")
    torch.distributed.barrier()


def test_a_rank_that_fails_is_reported_with_its_traceback_although_another_waits_for_it() -> None:
    with pytest.raises(RuntimeError, match=r"rank1 failed(.|\n)*_fail_on_rank_1(.|\n)*this rank is broken"):
        run_distributed(_fail_on_rank_1, 2)


def test_standins_are_refused_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_sbld.mcore.cpu import standins

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is available"):
        standins.install_cpu_standins()


SCRIPT = """
import torch
{before}
from megatron_sbld.mcore.cpu.standins import install_cpu_standins
install_cpu_standins()
install_cpu_standins()
from megatron.core.tensor_parallel import random
random.initialize_rng_tracker()
tracker = random.get_cuda_rng_tracker()
tracker.add("test", 7)
state = torch.get_rng_state()
with tracker.fork("test"):
    first = torch.rand(3)
assert torch.equal(torch.get_rng_state(), state)
assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(7)))
assert torch.zeros(1, device="cuda").device.type == "cpu" and torch.zeros(1, device="meta").device.type == "meta"
assert torch.ones(1).type() == "torch.cuda.FloatTensor" and torch.ones(1).type(torch.int32).dtype == torch.int32
"""


@pytest.mark.parametrize("before", ["", "import megatron.core.tensor_parallel, megatron.core.models.gpt"])
def test_standins_work_installed_before_and_after_megatron_is_imported(before: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: stand-ins are refused")
    script = SCRIPT.format(before=before)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=300)
