"""The paper's models as configs: sizes, batches and optimizer as their sources give them, and every override valid."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_sbld.cli import main as cli
from megatron_sbld.config.files import read_config
from megatron_sbld.config.flops import padded_vocab_size
from megatron_sbld.config.sections import Config
from megatron_sbld.config.validate import data_parallel_size, validate
from megatron_sbld.sensitivity.file import SensitivityFile

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs"
GPT2_VOCAB = 50_257
GPT3_TABLE = {0.125e9: 6e-4, 0.35e9: 3e-4, 0.76e9: 2.5e-4, 1.3e9: 2e-4, 2.7e9: 1.6e-4, 6.7e9: 1.2e-4, 13e9: 1e-4}
"""Learning rate by parameters: arXiv 2005.14165, Table 2.1."""
WARMUP_TOKENS, DECAY_TOKENS = 375e6, 260e9
"""The same, appendix B."""


@dataclasses.dataclass(frozen=True)
class Paper:
    """A model of the SBLD paper."""

    parameters: float
    sizes: tuple[int, int, int]
    """Layers, hidden size, heads."""
    gpus: int
    batch: int
    tensor: int
    iterations: int


PAPER = {
    "gpt3_350m": Paper(0.35e9, (24, 1024, 16), 64, 256, 1, 1_300_000),
    "gpt3_1.7b": Paper(1.7e9, (24, 2304, 24), 32, 512, 1, 10_000),
    "gpt3_3.6b": Paper(3.6e9, (30, 3072, 32), 64, 512, 2, 10_000),
}
FILES = [(name, suffix) for name in PAPER for suffix in ("", "_8gpus")]


def load(name: str, suffix: str = "") -> Config:
    return read_config(str(CONFIGS / f"{name}{suffix}.yaml"))


def parameters(config: Config) -> int:
    """Weights and biases of a GPT with tied embeddings, learned positions and MLPs of 4 h."""
    layers, hidden = config.model.num_layers, config.model.hidden_size
    rows = padded_vocab_size(GPT2_VOCAB, config) + config.model.context
    return layers * (12 * hidden**2 + 13 * hidden) + rows * hidden + 2 * hidden


def overrides(path: Path) -> list[str]:
    """The command lines that a file's head proposes."""
    lines = re.findall(r"^# (?:Baseline|PLD|SBLD|) +(--logging\.run_dir .*)$", path.read_text(), re.MULTILINE)
    return [line.strip() for line in lines]


@pytest.mark.parametrize(("name", "suffix"), FILES)
def test_a_config_is_the_model_of_its_name_on_its_number_of_gpus(name: str, suffix: str) -> None:
    config, paper = load(name, suffix), PAPER[name]
    gpus = 8 if suffix else paper.gpus
    validate(config, gpus)
    model, training = config.model, config.training
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == paper.sizes
    assert model.seq_length == 2048
    assert parameters(config) == pytest.approx(paper.parameters, rel=0.03)
    assert config.parallel.tensor_model_parallel_size == paper.tensor
    assert (training.global_batch_size, training.train_iters) == (paper.batch, paper.iterations)
    assert training.global_batch_size % (training.micro_batch_size * data_parallel_size(config, gpus)) == 0
    assert config.drop.policy == "none"


@pytest.mark.parametrize("name", PAPER)
def test_the_optimizer_is_gpt_3s_or_interpolated_between_its_sizes(name: str) -> None:
    config, paper = load(name), PAPER[name]
    text = (CONFIGS / f"{name}.yaml").read_text()
    opt, tokens = config.optimizer, config.training.global_batch_size * config.model.seq_length
    known = sorted(GPT3_TABLE)
    if paper.parameters in GPT3_TABLE:
        assert opt.lr == GPT3_TABLE[paper.parameters]
    else:
        below = max(size for size in known if size < paper.parameters)
        above = min(size for size in known if size > paper.parameters)
        share = math.log(paper.parameters / below) / math.log(above / below)
        between = GPT3_TABLE[below] + share * (GPT3_TABLE[above] - GPT3_TABLE[below])
        assert opt.lr == pytest.approx(between, rel=0.005)
    assert ("interpolated" in text) == (paper.parameters not in GPT3_TABLE)
    assert opt.min_lr == pytest.approx(0.1 * opt.lr)
    assert opt.lr_warmup_iters == round(WARMUP_TOKENS / tokens)
    assert opt.lr_decay_iters == round(DECAY_TOKENS / tokens)
    assert opt.lr_decay_style == "cosine"
    assert (opt.weight_decay, opt.adam_beta1, opt.adam_beta2, opt.adam_eps, opt.clip_grad) == (0.1, 0.9, 0.95, 1e-8, 1)


@pytest.mark.parametrize("name", PAPER)
def test_the_config_for_8_gpus_is_the_same_run(name: str) -> None:
    def fields(config: Config) -> dict[str, Any]:
        sections = dataclasses.asdict(config)
        return {f"{section}.{field}": value for section in sections for field, value in sections[section].items()}

    cluster, machine = fields(load(name)), fields(load(name, "_8gpus"))
    different = {field for field in cluster if cluster[field] != machine[field]}
    assert different == {"training.micro_batch_size", "checkpoint.save_interval", "logging.run_dir"}


@pytest.mark.parametrize(
    ("name", "suffix"), [FILES[0], *(pytest.param(*file, marks=pytest.mark.slow) for file in FILES[1:])]
)
def test_every_proposed_override_can_be_shown_before_training(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, layers = CONFIGS / f"{name}{suffix}.yaml", PAPER[name].sizes[0]
    monkeypatch.chdir(tmp_path)
    SensitivityFile.from_gaps(
        [0.01 * (layer % 7) for layer in range(layers)], [0.001] * layers, {"command": "made up"}
    ).save("gaps.json")
    lines = overrides(path)
    assert len(lines) == 7, "baseline, and PLD and SBLD at three thetas"
    shown: dict[str, str] = {}
    assert lines[0].split()[0] == "--logging.run_dir", "the baseline, which drops nothing"
    assert len(lines[0].split()) == 2
    for line in lines[1:]:
        given = shlex.split(line.replace("FILE", "gaps.json"))
        with pytest.raises(SystemExit) as ended:
            cli.main(["schedule", "show", "--config", str(path), *given])
        assert ended.value.code == 0, capsys.readouterr().err
        shown[line] = capsys.readouterr().out
    assert [line.split()[3] for line in lines[1:]] == ["pld"] * 3 + ["sbld"] * 3
    thetas = [re.search(r"--drop.theta (\S+)", line) for line in lines[1:]]
    assert [found and found[1] for found in thetas] == ["0.9", "0.7", "0.5"] * 2
    run_dirs = [re.search(r"--logging.run_dir (\S+)", line) for line in lines]
    assert len({found and found[1] for found in run_dirs}) == 7, "no two runs share a folder"
    assert len(set(shown.values())) == 6, "each drops otherwise"
