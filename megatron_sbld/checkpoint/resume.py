"""What a changed config means for a run that goes on: refused, in force and told, or without effect and told.

A field takes effect unless it stands in one of the tables below. Only what concerns this process alone is not told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_sbld.checkpoint.files import Layout
from megatron_sbld.config.run_length import RunLength
from megatron_sbld.config.sections import Config
from megatron_sbld.config.tokens import tokens_of
from megatron_sbld.method.build_tokens import with_strata
from megatron_sbld.method.config import DropConfig, drop_field_names
from megatron_sbld.method.in_force import dropped_update, drops, drops_tokens
from megatron_sbld.method.tokens import strata_needed

BATCH_FIELDS = ("training.global_batch_size", "training.rampup_batch_size")
"""How many samples each iteration reads."""

LENGTH_FIELDS = ("training.train_iters", "training.train_samples", *BATCH_FIELDS)
"""How many samples an iteration reads, and how many there are: learning rate, drops and data are planned with them."""

_TRAIN_DATA = "what data.train_data_path holds"

PLANNED_FIELDS = (*LENGTH_FIELDS, "training.seed", "model.seq_length", _TRAIN_DATA)
"""Refused unless checkpoint.replan is true."""

FIELDS_WITHOUT_EFFECT = {
    "model.init_method_std": "the weights are the checkpoint's",
    "model.make_vocab_size_divisible_by": "the embeddings keep the checkpoint's rows",
    "training.initial_loss_scale": "the loss scale goes on where it was",
}

_STAGE_FIELDS = ("drop.stages", "drop.stage_layers", "drop.stage_init", "drop.stage_copy_moments")

FIELDS_OF_THE_PROCESS = ("checkpoint", "logging", "training.exit_after_iterations")
"""Sections and fields that say what this process does, not what the run is."""

_MISSING = object()


@dataclass(frozen=True)
class Change:
    """A field whose value differs from the saved one, or training data that do whatever their path."""

    field: str
    saved: Any
    present: Any
    idle: str | None = None
    """Why it has no effect, where that depends on more than the field."""

    @property
    def text(self) -> str:
        """One line for the user."""
        if self.field == _TRAIN_DATA:
            return "data.train_data_path holds other data than when the checkpoint was saved"
        line = f"{self.field} is {self.present!r}, the checkpoint was saved with {self.saved!r}"
        reason = self.without_effect
        return line if reason is None else f"{line}: this has no effect, {reason}"

    @property
    def without_effect(self) -> str | None:
        """Why it has none; None where it has."""
        return self.idle or FIELDS_WITHOUT_EFFECT.get(self.field)


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint says about the run that saved it."""

    iteration: int
    layout: Layout
    train_state: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Mapping[str, Any]]:
        """Its config by section, as `dataclasses.asdict` made it."""
        return self.train_state.get("config", {})

    @property
    def consumed_tokens(self) -> int:
        """Tokens that it was trained on; where it does not say, as many for each sample."""
        samples = int(self.train_state["consumed_samples"])
        return int(self.train_state.get("consumed_tokens", samples * self.config["model"]["seq_length"]))

    @property
    def consumed_layer_tokens(self) -> int | None:
        """Tokens that its layers have processed, summed over layers; None where it dropped some and does not say."""
        if "consumed_layer_tokens" not in self.train_state and self.config.get("drop", {}).get("policy") == "none":
            return self.consumed_tokens * int(self.config["model"]["num_layers"])
        counted: int | None = self.train_state.get("consumed_layer_tokens")
        return counted


def find_changes(saved: Mapping[str, Mapping[str, Any]], config: Config) -> list[Change]:
    """The fields that differ and concern the run; what the saved config does not know is not compared.

    The drop section is compared as far as it is looked at: if it drops nothing, before and now, nothing of it is.
    """
    drop = saved.get("drop", {})
    if drop.get("policy") == "none" and drop.get("granularity") != "token" and not drops(config.drop):
        saved = {**saved, "drop": {}}
    changes = []
    for section, name, present in _fields(config):
        field = f"{section}.{name}"
        before = saved.get(section, {}).get(name, _MISSING)
        if field == "drop.dropped_update" and before is not _MISSING:  # null stands for one of the others
            before, present = before or _default_update(saved["drop"]), dropped_update(config.drop)
        if before is not _MISSING and before != present and not {section, field} & set(FIELDS_OF_THE_PROCESS):
            changes.append(Change(field, before, present))
    return changes


def _default_update(saved_drop: Mapping[str, Any]) -> str:
    known = {name: value for name, value in saved_drop.items() if name in drop_field_names()}
    return dropped_update(DropConfig(**known))


def check_resume(saved: SavedRun, config: Config, train_data: list[list[float]]) -> list[Change]:
    """The changes of a run that goes on, none of which is to be refused.

    Args:
        saved: the checkpoint.
        config: the present config.
        train_data: facts (data/blend.py) of the present training data.

    Raises:
        ValueError: naming each field that plans the run and has changed, unless checkpoint.replan is true; a length
            that is below what is done; or what check_layer_tokens refuses.
    """
    found = find_changes(saved.config, config)
    changes = [replace(change, idle=_idle_reason(change, found, saved, config)) for change in found]
    before = saved.train_state.get("train_data")
    if before not in (None, train_data):
        changes.append(Change(_TRAIN_DATA, before, train_data))
    _check_strata(saved, config)
    planned = [change.text for change in changes if change.field in PLANNED_FIELDS]
    if planned and not config.checkpoint.replan:
        raise ValueError(
            "; ".join(planned)
            + ". Learning rate, drops and the order of the data were planned with it. Set it as it was, or set "
            "checkpoint.replan true to plan the rest of the run anew. (training.exit_after_iterations runs a part.)"
        )
    check_layer_tokens(saved, config)
    total = run_length(saved, config).train_iters
    if total < saved.iteration:
        name = "train_iters" if config.training.train_iters is not None else "train_samples"
        raise ValueError(
            f"training.{name} = {getattr(config.training, name)}: makes a run of {total} iterations, but the "
            f"checkpoint has done {saved.iteration}; must be at least as many"
        )
    return changes


def check_layer_tokens(saved: SavedRun, config: Config) -> None:
    """Refuse a learning rate by layer-tokens for a run that does not know how many it has consumed."""
    if config.optimizer.lr_schedule_by == "layer_tokens" and saved.consumed_layer_tokens is None:
        raise ValueError(
            "optimizer.lr_schedule_by = 'layer_tokens': the checkpoint is of a run that dropped layers and does not "
            "say how many layer-tokens it has consumed; allowed is 'iterations', or a run of its own that loads the "
            "weights alone"
        )


def _check_strata(saved: SavedRun, config: Config) -> None:
    """Refuse the checkpoint's strata where this layout cannot draw them; token_strata, if set, takes their place."""
    strata = (saved.train_state.get("drop") or {}).get("token_strata")
    tokens = tokens_of(config, 1)
    if strata is not None and tokens is not None and config.drop.token_strata is None:
        with_strata(tokens, strata, strata_needed(config.parallel))


def _idle_reason(change: Change, changes: Sequence[Change], saved: SavedRun, config: Config) -> str | None:
    """Why a change of the layers that begin together, of those that are balanced or of strata has no effect."""
    drop = config.drop
    if change.field == "drop.balance_stages" and drop.sampler == "balanced":
        return "the balanced sampler keeps the checkpoint's stages" if change.present is None else None
    if change.field == "drop.token_strata" and drops_tokens(drop):
        return "the run keeps the checkpoint's strata" if change.present is None else None
    staged = drop.stages is not None or saved.config.get("drop", {}).get("stages") is not None
    if not staged or change.field not in (*_STAGE_FIELDS, "drop.balance_stages"):
        return None
    growth = (saved.train_state.get("drop") or {}).get("growth")
    if growth is None or len(growth["begun"]) == config.model.num_layers:
        return "every layer had begun"
    if change.field == "drop.balance_stages" and not {other.field for other in changes} & set(_STAGE_FIELDS[:2]):
        return "the stages keep the checkpoint's layers"
    return None


def run_length(saved: SavedRun, config: Config) -> RunLength:
    """The length of a run that goes on: batch sizes hold from where they were last planned."""
    if any(change.field in BATCH_FIELDS for change in find_changes(saved.config, config)):
        planned_from = [saved.iteration, int(saved.train_state["consumed_samples"])]
    else:
        planned_from = saved.train_state.get("planned_from", [0, 0])
    return RunLength(config.training, *planned_from)


def warnings_of_decisions(saved: SavedRun, config: Config, replicas: int) -> list[str]:
    """Why drop decisions meet other samples than they did on the layout that saved the checkpoint."""
    drop, before = config.drop, saved.config.get("training", {}).get("micro_batch_size")
    if drop.policy == "none" or before is None:
        return []
    unit, saved_unit = config.training.micro_batch_size * replicas, before * saved.layout.data_parallel_size
    lines = []
    if unit != saved_unit and (drop.decision_scope == "microbatch" or drop.granularity == "sample"):
        name = f"decision_scope {drop.decision_scope!r} and granularity {drop.granularity!r}"
        lines.append(
            f"drop: with {name} decisions are drawn for each microbatch, and one holds {unit} samples of all replicas "
            f"together now, {saved_unit} when saved: from here on the run differs from one on the former layout"
        )
    if replicas != saved.layout.data_parallel_size and drop.replicas == "distinct":
        lines.append(
            f"drop: with replicas 'distinct' each of the {replicas} replicas has its own decisions; there were "
            f"{saved.layout.data_parallel_size} when saved: from here on the run differs from one on the former layout"
        )
    return lines


def _fields(config: Config) -> Iterator[tuple[str, str, Any]]:
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            yield section.name, field.name, getattr(values, field.name)
