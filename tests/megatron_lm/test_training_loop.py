"""Megatron-LM's own training loop as megatron-core's wheel has it, by examples/megatron_lm/pretrain_gpt.py, on CPU.

Of core 0.19. What is skipped before that is seen against checkouts alone, by scripts/check_patches.sh.
"""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_sbld.hf.stored_weights import StoredWeights
from megatron_sbld.mcore.compat import core_version
from megatron_sbld.megatron_lm.arguments import argument_name
from megatron_sbld.method.build import build_policy
from megatron_sbld.method.config import DropConfig
from tests.megatron_lm.compare_runs import TOLERANCE, check_decisions, near, same, scalars
from tests.megatron_lm.loop_cases import CommandCase, ScriptCase, run_case
from tests.training.trainer_helpers import (
    NO_DROPOUT,
    call_on_ranks,
    change,
    prepare_corpus,
    sbld,
    tiny_run,
    tiny_sections,
)

pytestmark = pytest.mark.skipif(
    core_version() < (0, 19) or importlib.util.find_spec("megatron.training") is None,
    reason="needs megatron.training of core 0.19: 0.16's wheel has none, 0.17's and 0.18's differ",
)

LAYERS, ITERATIONS, HALF = 4, 8, 4
PATIENCE = 540.0  # seconds for all runs of a fixture; beside nothing else they take about a minute
OVERLAPPED = "DP 2, distributed optimizer, overlaps"
"""Saves, and cannot resume where Apex and Transformer Engine are missing: Megatron-LM's own fault, stock as well."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "TP 2": (2, ("--tensor-model-parallel-size", "2")),
    "PP 2": (2, ("--pipeline-model-parallel-size", "2")),
    "DP 2": (2, ()),
    OVERLAPPED: (2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
}
STAGES: dict[str, Any] = {
    "stages": [[0.5, 2], [1.0, LAYERS]],
    "stage_layers": [1, 3],
    "stage_init": "copy",
    "stage_warmup": 0.25,
}
"""Layers 1 and 3 run until HALF, one on each of two pipeline ranks."""
BY_LAYER_TOKENS = ("--sbld-lr-schedule-by", "layer_tokens")
TRAINING = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 1 --global-batch-size 8 --train-iters 8 --eval-interval 4 --eval-iters 1
    --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 1.0
    --hidden-dropout 0 --attention-dropout 0 --transformer-impl local --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion
    --attention-backend unfused --distributed-backend gloo --tokenizer-type NullTokenizer --vocab-size 259
    --num-workers 0 --log-interval 1 --ckpt-format torch_dist --save-interval 2
"""
"""As trainer_helpers' runs; 259 tokens are its bytes and their control tokens."""


class Runs:
    """Runs of one layout in a folder, and what was asked of them."""

    def __init__(self, folder: Path, corpus: Path, layout: Sequence[str] = ()) -> None:
        self.folder, self._corpus, self._layout = folder, corpus, layout
        self.drop = sbld(folder)
        self.cases: list[Any] = []

    def script(
        self, name: str, *words: str, stock: bool = False, any_depth: bool = False, refused: str = "", **drop: Any
    ) -> None:
        """Train from the beginning, with this drop section, and save; or be refused with a message."""
        data = {"train": f"{self._corpus}_train", "valid": f"{self._corpus}_valid"}
        given = [word for split, prefix in data.items() for word in (f"--{split}-data-path", prefix)]
        folders = {"data-cache-path": "cache", "tensorboard-dir": name, "save": f"{name}/checkpoints"}
        given += [word for option, path in folders.items() for word in (f"--{option}", str(self.folder / path))]
        words = (*TRAINING.split(), *given, *self._layout, *arguments(drop), *words)
        how = {"stock": stock, "any_depth": any_depth, "refused": refused}
        self.cases.append(ScriptCase(name=name, folder=str(self.folder), words=words, **how))

    def resume(self, name: str, saved: str, *words: str, at: int = HALF, **drop: Any) -> None:
        """Continue from what another run saved."""
        self.script(name, "--load", str(self.folder / saved / "checkpoints"), "--ckpt-step", str(at), *words, **drop)

    def plain_runs(self, resume: bool = True) -> None:
        """What is looked at on every layout."""
        self.script("stock", stock=True)
        self.script("absent")
        self.script("dropping", **self.drop)
        self.script("growing", **self.drop, **STAGES)
        if not resume:
            return
        self.resume("dropping resumed", "dropping", **self.drop)
        for at in (HALF, HALF + 2):
            self.resume(f"growing resumed at {at}", "growing", at=at, **self.drop, **STAGES)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def checkpoint(self, name: str, iteration: int = ITERATIONS) -> str:
        return str(self.folder / name / "checkpoints" / f"iter_{iteration:07d}")

    def same(self, one: str, other: str, first: int = 1) -> None:
        same(self.path(one), self.path(other), asked(first))

    def near(self, one: str, other: str, first: int = 1) -> None:
        near(self.path(one), self.path(other), asked(first))


def arguments(drop: dict[str, Any]) -> list[str]:
    """The drop section on the command line."""
    words = []
    for field, value in drop.items():
        words.append(argument_name(field))
        if field == "allow_layers":
            words += map(str, value)
        else:
            words.append(json.dumps(value) if isinstance(value, list) else str(value))
    return words


def asked(first: int) -> Namespace:
    return Namespace(first=first, iterations=ITERATIONS, other_layout=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Runs:
    """All of one process: also what `megatron-sbld` does with Megatron-LM's checkpoints, and the reverse."""
    runs = Runs(tmp_path_factory.mktemp("alone"), corpus)
    runs.plain_runs()
    for start in ("stock", "dropping"):
        runs.resume(f"stock from {start}", start, stock=True)
        runs.resume(f"kept from {start}", start, policy="layerdrop", theta=1.0)
    staged = {"policy": "staged", "stages": [[0.5, 2], [1.0, LAYERS]], "stage_layers": "first"}
    runs.script(
        "not here",
        "--mtp-num-layers",
        "1",
        "--position-embedding-type",
        "rope",
        refused="--mtp-num-layers: not allowed",
    )
    runs.script("mistake", refused="--sbld-sensitivity", policy="sbld")
    runs.script("staged", any_depth=True, **staged)
    runs.script("shallow", "--num-layers", "2", stock=True, any_depth=True)

    runs.script("by layer tokens", *BY_LAYER_TOKENS, **runs.drop)
    runs.resume("by layer tokens resumed", "by layer tokens", *BY_LAYER_TOKENS, **runs.drop)
    config = trainer_config(runs, corpus)
    own = tiny_run(runs.folder / "pretrained", corpus, **config)
    tuned = change(own, logging={"run_dir": runs.path("tuned")}, checkpoint={"load": runs.checkpoint("dropping", HALF)})
    runs.cases += [own, tuned]
    runs.cases.append(
        change(
            own,
            logging={"run_dir": runs.path("pretrained by layer tokens")},
            optimizer={"lr_schedule_by": "layer_tokens"},
        )
    )
    runs.resume("from pretrained by layer tokens", "pretrained by layer tokens", *BY_LAYER_TOKENS, **runs.drop)
    runs.resume("from pretrained", "pretrained", **runs.drop)
    runs.resume("finetuned", "dropping", "--finetune", **runs.drop)
    file = runs.folder / "gpt.yaml"
    file.write_text(yaml.safe_dump(tiny_sections(runs.folder / "pretrained", corpus, **config)))
    text = runs.folder / "text.jsonl"
    text.write_text(json.dumps({"text": "Layers that are dropped cost nothing. " * 20}) + "\n")
    for name, config_file in {"dropping": ("--config", str(file)), "pretrained": ()}.items():
        model = (*config_file, "--checkpoint", runs.checkpoint(name))
        task = ("--data", str(text), "--out", runs.path(f"{name} evaluated"))
        runs.cases.append(CommandCase(words=("evaluate", "perplexity", *model, *task)))
        runs.cases.append(CommandCase(words=("export", "hf", *model, runs.path(f"{name} exported"))))
    call_on_ranks(1, run_case, runs.cases, timeout=PATIENCE)
    return runs


def trainer_config(runs: Runs, corpus: Path) -> dict[str, dict[str, Any]]:
    """What TRAINING says, for `megatron-sbld pretrain`."""
    return {
        "model": {**NO_DROPOUT, "make_vocab_size_divisible_by": 128},
        "data": {"train_data_path": [f"{corpus}_train"], "valid_data_path": [f"{corpus}_valid"]},
        "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "lr_warmup_iters": 2, "adam_beta2": 0.999},
        "checkpoint": {"save_interval": 2, "save_at_end": True},
        "drop": runs.drop,
    }


@pytest.fixture(scope="module")
def in_pairs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[str, Runs]:
    """The layouts of two processes, in the same two."""
    layouts = {name: words for name, (processes, words) in LAYOUTS.items() if processes == 2}
    found = {name: Runs(tmp_path_factory.mktemp("pair"), corpus, words) for name, words in layouts.items()}
    for name, runs in found.items():
        runs.plain_runs(resume=name != OVERLAPPED)
    call_on_ranks(2, run_case, [case for runs in found.values() for case in runs.cases], timeout=PATIENCE)
    return found


@pytest.fixture
def of_layout(request: pytest.FixtureRequest) -> Callable[[str], Runs]:
    def find(layout: str) -> Runs:
        alone = LAYOUTS[layout][0] == 1
        return request.getfixturevalue("alone") if alone else request.getfixturevalue("in_pairs")[layout]

    return find


@pytest.fixture(params=LAYOUTS)
def runs(request: pytest.FixtureRequest, of_layout: Callable[[str], Runs]) -> Runs:
    return of_layout(request.param)


def test_without_the_arguments_every_loss_is_stock_bit_for_bit(runs: Runs) -> None:
    runs.same("stock", "absent")


@pytest.mark.parametrize("name", ["dropping", "growing"])
def test_the_decisions_are_those_that_are_drawn_for_the_seed(runs: Runs, name: str) -> None:
    stages = STAGES if name == "growing" else {}
    config = DropConfig(**runs.drop, **stages)
    ranks = [[1, 2], [3, 4]] if "--pipeline-model-parallel-size" in runs._layout else [[1, 2, 3, 4]]
    policy = build_policy(config, LAYERS, ITERATIONS, ranks=ranks)
    logged = scalars(runs.path(name))
    kept = check_decisions(logged, policy, config.seed, range(1, ITERATIONS + 1))
    assert min(kept) < 1.0
    if stages:
        assert [logged["begun_layers"][i] for i in range(1, ITERATIONS + 1)] == [2] * HALF + [LAYERS] * HALF


@pytest.mark.parametrize(("name", "at"), [("dropping", HALF), ("growing", HALF), ("growing", HALF + 2)])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != OVERLAPPED])
def test_resumed_bit_for_bit(of_layout: Callable[[str], Runs], layout: str, name: str, at: int) -> None:
    """Growing: after HALF iterations layers begin in the first one of the resumed run, two later they have."""
    resumed = "dropping resumed" if name == "dropping" else f"growing resumed at {at}"
    of_layout(layout).same(name, resumed, first=at + 1)


def test_layers_stay_as_they_are_until_they_begin(runs: Runs) -> None:
    name = "decoder.layers.mlp.linear_fc2.weight"
    earlier, half, last = (
        StoredWeights(Path(runs.checkpoint("growing", iteration))).read(name) for iteration in (2, HALF, ITERATIONS)
    )
    until_half, later = (
        [not torch.equal(*pair) for pair in zip(*states, strict=True)] for states in ((earlier, half), (half, last))
    )
    assert until_half[0] or until_half[2]  # which have begun, but SBLD may drop one in both iterations
    assert [until_half[1], until_half[3], later[1], later[3]] == [False, False, True, True]


def test_the_learning_rate_rises_again_when_layers_begin(runs: Runs) -> None:
    """What is logged with an iteration is the rate of the next one."""
    stock, growing = (scalars(runs.path(name))["learning-rate"] for name in ("stock", "growing"))
    ratios = [growing[i] / stock[i] for i in range(1, ITERATIONS + 1)]
    assert ratios == pytest.approx([1.0] * (HALF - 1) + [0.5] + [1.0] * HALF, rel=1e-6)


def test_until_layers_begin_the_losses_are_a_shallower_models(alone: Runs) -> None:
    staged, shallow = (scalars(alone.path(name))["lm loss"] for name in ("staged", "shallow"))
    equal = [staged[i] == pytest.approx(shallow[i], rel=1e-6) for i in range(1, ITERATIONS + 1)]
    assert equal[:HALF] == [True] * HALF
    assert not any(equal[HALF + 1 :])  # the first loss of a layer's first iteration may still be near


def test_stock_and_a_policy_that_keeps_all_continue_each_others_checkpoints(alone: Runs) -> None:
    alone.same("stock", "stock from stock", first=HALF + 1)
    alone.same("stock", "kept from stock", first=HALF + 1)
    alone.same("stock from dropping", "kept from dropping", first=HALF + 1)


def test_it_is_the_run_of_megatron_sbld_pretrain_and_continues_its_checkpoints(alone: Runs) -> None:
    alone.near("dropping", "pretrained")
    alone.near("pretrained", "from pretrained", first=HALF + 1)
    config = DropConfig(**alone.drop)
    policy = build_policy(config, LAYERS, ITERATIONS)
    check_decisions(scalars(alone.path("from pretrained")), policy, config.seed, range(HALF + 1, ITERATIONS + 1))


def test_layer_tokens_drive_its_learning_rate_as_they_do_the_trainers(alone: Runs) -> None:
    alone.near("by layer tokens", "pretrained by layer tokens")
    alone.same("by layer tokens", "by layer tokens resumed", first=HALF + 1)
    alone.near("pretrained by layer tokens", "from pretrained by layer tokens", first=HALF + 1)
    usual, driven = (scalars(alone.path(name))["learning-rate"] for name in ("dropping", "by layer tokens"))
    assert driven[2] < usual[2]


def test_megatron_sbld_pretrains_from_its_weights_as_finetuning_does(alone: Runs) -> None:
    alone.near("finetuned", "tuned")


def test_megatron_sbld_evaluates_its_checkpoint(alone: Runs) -> None:
    one, other = (
        json.loads(Path(alone.path(f"{name} evaluated"), "evaluations.jsonl").read_text())["metrics"]["loss"]
        for name in ("dropping", "pretrained")
    )
    assert one == pytest.approx(other, rel=TOLERANCE)


def test_megatron_sbld_exports_its_checkpoint(alone: Runs) -> None:
    one, other = (
        load_file(Path(alone.path(f"{name} exported"), "model.safetensors")) for name in ("dropping", "pretrained")
    )
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-4, msg=name)
