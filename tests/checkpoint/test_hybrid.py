"""A GPT's checkpoint of a run that drops layers, continued by a HybridModel with unit `block`.

megatron-core from 0.19 on reads it by its own translation, which Megatron-LM's load_checkpoint uses too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sbld.checkpoint import state as content
from megatron_sbld.controller import CHECKPOINT_KEY, DropController
from megatron_sbld.mcore import freeze_dropped_layers, make_switchable
from megatron_sbld.mcore.optimizer.state import load_state, sharded_state
from megatron_sbld.method.policy import LayerDropPolicy
from megatron_sbld.method.schedule import Linear
from tests.harness import model_parallel, run_distributed, single_process
from tests.mcore.helpers import build_optimizer, tiny_config, tiny_gpt, train_step, wrap_ddp
from tests.mcore.hybrid import tiny_hybrid

interop = pytest.importorskip(
    "megatron.core.dist_checkpointing.gpt_checkpoint_interop", reason="megatron-core before 0.19 has no translation"
)

LAYERS, STOP, END = 4, 3, 6
PATTERN = "*-*-*-*-"


@dataclass
class Training:
    """A GPT of LAYERS layers, or with a pattern the HybridModel that it is."""

    pattern: str = ""
    ddp: dict[str, Any] = field(default_factory=dict)
    scope: Any = "iteration"

    def __post_init__(self) -> None:
        config = tiny_config(num_layers=len(self.pattern.replace("|", "")) or LAYERS)
        chunks = tiny_hybrid(config, self.pattern) if self.pattern else tiny_gpt(config)
        policy = LayerDropPolicy(Linear(start=0.8, end=0.3, duration=END), LAYERS)
        self.controller = DropController(policy, seed=5, scope=self.scope)
        make_switchable(chunks, self.controller, unit="block")
        self.models = wrap_ddp(chunks, **self.ddp)
        self.optimizer = build_optimizer(self.models, weight_decay=0.1)
        freeze_dropped_layers(self.models, self.optimizer)
        distributed = self.ddp.get("use_distributed_optimizer", False)
        self.metadata = content.content_metadata(content.FULLY_RESHARDABLE if distributed else content.NOT_DISTRIBUTED)

    def run(self, iterations: Iterable[int]) -> list[tuple[float, Any]]:
        """Loss and decisions of each iteration."""
        rows = []
        for iteration in iterations:
            loss = train_step(self.models, self.optimizer, iteration, self.controller.begin_iteration).loss
            rows.append((loss, self.controller.plan[:2].tolist()))  # replicas divide the microbatches
        return rows

    def state(self, *, is_loading: bool) -> dict[str, Any]:
        state = content.model_state(self.models, self.metadata)
        metadata = content.with_group(self.metadata)
        return {**state, "optimizer": sharded_state(self.optimizer, state, metadata, is_loading=is_loading)}

    def save(self, path: Path) -> None:
        state = self.state(is_loading=False)
        state["opt_param_scheduler"] = {CHECKPOINT_KEY: {"drop": self.controller.state_dict()}}
        snapshot = content.take_snapshot({**state, "content_metadata": self.metadata}, copy=False)
        if dist.get_rank() == 0:
            content.write_common(path, snapshot)
        dist.barrier()
        content.write_shards(path, snapshot, dist.group.WORLD)

    def load_gpt(self, path: Path) -> None:
        maps = interop.gpt_compatible_layer_maps(self.pattern)
        state = self.state(is_loading=True)
        for part in state.values():
            interop.retarget_sharded_state_dict_to_gpt_checkpoint(part, maps)
        loaded = content.read(path, state, ignored=())
        content.load_model(self.models, loaded)
        load_state(self.optimizer, loaded["optimizer"])
        assert self.controller.load_state_dict(loaded["opt_param_scheduler"][CHECKPOINT_KEY]["drop"]) == []


def continued(path: Path, layout: dict[str, int], **options: Any) -> tuple[list[Any], list[Any]]:
    """A GPT's run from its beginning to its end, and the end of it by a HybridModel on another layout."""
    with model_parallel():
        training = Training(**options)
        rows = training.run(range(1, STOP + 1))
        training.save(path)
        rows += training.run(range(STOP + 1, END + 1))
    with model_parallel(**layout):
        pattern = "*-*-|*-*-" if parallel_state.get_pipeline_model_parallel_world_size() > 1 else PATTERN
        training = Training(pattern=pattern, **options)
        training.load_gpt(path)
        return rows[STOP:], training.run(range(STOP + 1, END + 1))


def on_two(path: Path, ddp: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    return continued(path, {"pp": 2}, ddp=ddp)


@pytest.mark.parametrize("scope", ["iteration", "microbatch"])
def test_a_gpts_checkpoint_continues_as_the_run_that_was_saved(tmp_path: Path, scope: str) -> None:
    with single_process():
        whole, hybrid = continued(tmp_path / "checkpoint", {}, scope=scope)
    assert hybrid == whole


@pytest.mark.slow
def test_it_continues_on_another_layout_with_the_distributed_optimizer(tmp_path: Path) -> None:
    ddp = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    for whole, hybrid in run_distributed(on_two, 2, tmp_path / "checkpoint", ddp):
        assert [row[1] for row in hybrid] == [row[1] for row in whole]
        assert [row[0] for row in hybrid] == pytest.approx([row[0] for row in whole], rel=1e-5)


def test_with_unit_layer_the_decisions_do_not_fit_and_that_is_said(tmp_path: Path) -> None:
    saved = DropController(LayerDropPolicy(Linear(start=0.8, end=0.3, duration=END), LAYERS)).state_dict()
    by_layers = DropController(LayerDropPolicy(Linear(start=0.8, end=0.3, duration=END), 2 * LAYERS))
    with pytest.raises(ValueError, match=r"of a model with 4 layers, this one has 8: .* unit 'block'"):
        by_layers.load_state_dict(saved)
