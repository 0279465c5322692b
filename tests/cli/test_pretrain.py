"""`megatron-sbld pretrain`: values from file and command line, and mistakes that end in one message and status 2."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from megatron_sbld import doctor
from megatron_sbld.checkpoint.start import find_start
from megatron_sbld.cli import main as cli
from megatron_sbld.cli import pretrain
from megatron_sbld.config.sections import Config
from megatron_sbld.config.validate import validate
from megatron_sbld.data import prepare
from megatron_sbld.data.blend import find_data
from megatron_sbld.data.dataset_files import verify_dataset
from megatron_sbld.data.prepare import PrepareConfig
from megatron_sbld.data.tokenizer import load_tokenizer
from megatron_sbld.sensitivity.file import SensitivityFile
from megatron_sbld.training import loop
from tests.training.trainer_helpers import (
    LAYERS,
    in_folder,
    prepare_corpus,
    run_here,
    tiny_run,
    tiny_sections,
    write_sensitivity,
)

Sections = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a finished run in `done`."""
    folder = tmp_path_factory.mktemp("cli")
    config = tiny_run(
        folder / "done", prepare_corpus(folder), training={"train_iters": 3}, checkpoint={"save_at_end": True}
    )
    assert run_here(config) == 0
    return folder


@pytest.fixture
def sections(shared: Path, tmp_path: Path) -> Sections:
    """What a valid config file holds."""
    return tiny_sections(tmp_path / "run", shared / "corpus")


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs that reach the trainer, which does not run."""
    configs: list[Config] = []
    monkeypatch.setattr(loop, "pretrain", lambda config, tasks_of: configs.append(config) or 0)
    return configs


def command(*args: str) -> int | str | None:
    """The exit status of `megatron-sbld` with these arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    return ended.value.code


def write(folder: Path, content: Sections | bytes) -> str:
    """A config file."""
    path = folder / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
    return str(path)


def test_the_command_line_wins_over_the_file_wherever_it_stands(
    received: list[Config], sections: Sections, tmp_path: Path
) -> None:
    path = write(tmp_path, sections)
    for args in (
        ("--config", path, "--optimizer.lr", "0.5", "--training.seed=7"),
        ("--optimizer.lr", "0.5", f"--config={path}", "--training.seed=7"),
        ("--optimizer.lr=0.5", "--training.seed", "7", "--config", path),
    ):
        assert command("pretrain", *args) == 0
        config = received.pop()
        assert (config.optimizer.lr, config.training.seed, config.model.num_layers) == (0.5, 7, LAYERS)


def test_a_resolved_config_is_a_config_file(received: list[Config], sections: Sections, tmp_path: Path) -> None:
    assert command("pretrain", "--config", write(tmp_path, sections)) == 0
    assert command("pretrain", "--config", write(tmp_path, dataclasses.asdict(received[0]))) == 0
    assert received[1] == received[0]


def test_lists_and_null_can_be_given_on_the_command_line(received: list[Config], capsys: Any) -> None:
    args = ["--training.rampup_batch_size", "[8, 8, 64]", "--drop.block_layers=[1, 4]", "--data.train_data_path=[a, b]"]
    assert command("pretrain", *args, "--model.kv_channels", "null") == 0
    config = received[0]
    assert config.training.rampup_batch_size == [8, 8, 64]
    assert config.drop.block_layers == [1, 4]
    assert config.data.train_data_path == ["a", "b"]
    assert config.model.kv_channels is None
    added = ["--drop.block_layers", "[1]", "--drop.block_layers+", "4", "--data.train_data_path+=c"]
    assert command("pretrain", *added) == 0
    assert received[1].drop.block_layers == [1, 4]
    assert received[1].data.train_data_path == ["c"]
    assert "unknown option --training.seed+" in refused(capsys, "--training.seed+", "4")
    assert "--drop.block_layers+: 010 is not allowed" in refused(capsys, "--drop.block_layers+", "010")


@pytest.mark.parametrize("text", ["---", "# #", "#", "...", "a # b", "~", "null "])
def test_text_that_yaml_takes_for_nothing_is_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[PrepareConfig] = []

    def keep(config: PrepareConfig) -> None:
        found.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare", keep)
    assert command("prepare", "in", "--output", "out", f"--document_separator={text}") == 130
    assert found[0].document_separator == (None if text == "null " else text)


def test_help_names_every_field_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("pretrain", "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for section in (field.name for field in dataclasses.fields(Config)):
        for field in dataclasses.fields(getattr(Config(), section)):
            assert f"--{section}.{field.name} " in printed
    assert "Iterations between validations; 0 validates at the end alone." in printed


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The message of a mistake: status 2, one message, no traceback."""
    assert command("pretrain", *args) == cli.EXIT_MISTAKE
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.count("megatron-sbld: error") == 1
    return printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "is not valid YAML"),
        (b"\x00\x01", "is not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read|is not valid YAML"),
        (b"model: !!python/object/apply:os.system [exit]", "is not valid YAML"),
        (b"training: {seed: 2024-13-45}", "training.seed"),
        (b"[" * 5000, "is not valid YAML"),
        (b"- model", "must be a mapping of sections"),
        (b"", "must be a mapping of sections"),
        (b"model: 7", "section model must be a mapping of fields, not 7"),
        (b"modle: {}", "unknown section modle; did you mean model?"),
        (b"model: {num_layer: 4}", "unknown field model.num_layer; did you mean num_layers"),
        (b"model: {1: 4}", "unknown field model.1; allowed are num_layers, hidden_size"),
        (b"model: {num_layers: four}", "num_layers"),
        (b"model: {num_layers: [4]}", "num_layers"),
        (b"model: {num_layers: null}", "model.num_layers = null: must have a value"),
        (b"optimizer: {lr: " + b"9" * 400 + b"}", "optimizer.lr = 9+: must have at most 64 bits"),
        (b"optimizer: {lr: .nan}", r"optimizer.lr = nan is not allowed: it must be a number in \(0, inf\), and finite"),
        (b"training: {precision: fp8}", "precision"),
        (b"drop: {policy: sdlb}", "policy"),
    ],
)
def test_a_malformed_config_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    assert_matches(refused(capsys, "--config", write(tmp_path, content)), message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--modle.num_layers", "4"], "unknown option --modle.num_layers; did you mean model?"),
        (["--model.num_layer", "4"], "unknown option --model.num_layer; did you mean num_layers"),
        (["--model.num_layers", "four"], "num_layers"),
        (["--model.num_layers"], "num_layers"),
        (["--optimizer.lr", "9" * 400], "too large"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--config"], "config"),
        (["stray"], "stray"),
        ([], "training.train_iters = None does not work with training.train_samples = None"),
    ],
)
def test_a_malformed_command_line_is_refused(capsys: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
    assert_matches(refused(capsys, *args), message)


def test_an_interrupted_command_says_so_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupt)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor"])
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "megatron-sbld: interrupted\n"


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("pretrian") == cli.EXIT_MISTAKE
    assert "unknown command 'pretrian'; allowed are prepare, pretrain" in capsys.readouterr().err


def assert_matches(printed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(" ".join(printed.split()))


# Mistakes that only files tell. `{}` in a message is the folder of the test.
def truncated_bin(sections: Sections, folder: Path) -> None:
    path = Path(f"{use_copy_of_corpus(sections, folder)}_train.bin")
    path.write_bytes(path.read_bytes()[:-1])


def missing_index(sections: Sections, folder: Path) -> None:
    Path(f"{use_copy_of_corpus(sections, folder)}_train.idx").unlink()


def use_copy_of_corpus(sections: Sections, folder: Path) -> Path:
    prefix = Path(sections["data"]["train_data_path"][0].removesuffix("_train"))
    for path in prefix.parent.glob("corpus*"):
        if path.is_file():
            shutil.copy(path, folder)
    sections["data"]["train_data_path"] = [f"{folder}/corpus_train"]
    return folder / "corpus"


def missing_tokenizer(sections: Sections, folder: Path) -> None:
    sections["data"]["tokenizer"] = str(folder / "tokenizer.json")


def sensitivity_of_another_depth(sections: Sections, folder: Path) -> None:
    sections["drop"] = {"policy": "sbld", "sensitivity": write_sensitivity(folder, 7)}


def truncated_sensitivity(sections: Sections, folder: Path) -> None:
    path = Path(write_sensitivity(folder))
    path.write_bytes(path.read_bytes()[:100])
    sections["drop"] = {"policy": "sbld", "sensitivity": str(path)}


def finished_run(sections: Sections, folder: Path) -> None:
    done = Path(sections["data"]["train_data_path"][0]).parent / "done"
    shutil.copytree(done, sections["logging"]["run_dir"])


def resume_never(sections: Sections, folder: Path) -> None:
    finished_run(sections, folder)
    sections["checkpoint"]["resume"] = "never"


def resume_always(sections: Sections, folder: Path) -> None:
    sections["checkpoint"]["resume"] = "always"


def another_depth(sections: Sections, folder: Path) -> None:
    finished_run(sections, folder)
    sections["model"]["num_layers"] = 6


def another_mlp_to_load(sections: Sections, folder: Path) -> None:
    done = Path(sections["data"]["train_data_path"][0]).parent / "done"
    sections["checkpoint"]["load"] = str(done)
    sections["model"]["swiglu"] = True


def load_from_nowhere(sections: Sections, folder: Path) -> None:
    sections["checkpoint"]["load"] = str(folder / "nowhere")


def run_folder_is_a_file(sections: Sections, folder: Path) -> None:
    Path(sections["logging"]["run_dir"]).write_text("taken")


def transformer_engine(sections: Sections, folder: Path) -> None:
    sections["model"]["transformer_impl"] = "transformer_engine"


def nccl(sections: Sections, folder: Path) -> None:
    sections["parallel"] = {"distributed_backend": "nccl"}


def two_stages_for_one_process(sections: Sections, folder: Path) -> None:
    sections["parallel"] = {"pipeline_model_parallel_size": 2}


FILES = {
    truncated_bin: r"data.train_data_path: {}/corpus_train.bin: cut short or damaged: expected \d+ bytes, found \d+",
    missing_index: r"{}/corpus_train.idx does not exist",
    missing_tokenizer: r"tokenizer.json",
    sensitivity_of_another_depth: r"drop.sensitivity = .* is for 7 layers, but the model has 4",
    truncated_sensitivity: r"drop.sensitivity = .* is not valid JSON \(truncated\?\)",
    resume_never: r"checkpoint.resume = 'never': .* holds a checkpoint of iteration 3",
    resume_always: r"checkpoint.resume = 'always': .* holds no complete checkpoint",
    another_depth: r"the checkpoint holds another model: model.num_layers is 6, but the checkpoint has 4",
    another_mlp_to_load: r"model.swiglu is True, but the checkpoint has False",
    load_from_nowhere: r"checkpoint {}/nowhere: not a checkpoint of megatron-sbld",
    run_folder_is_a_file: r"{}/run",
    two_stages_for_one_process: r"1 processes: must be a multiple of",
}
NEEDING_A_GPU = {
    transformer_engine: r"model.transformer_impl=transformer_engine: Transformer Engine needs a CUDA device",
    nccl: r"parallel.distributed_backend = 'nccl': needs a CUDA device",
}


@pytest.mark.parametrize("mistake", FILES, ids=lambda mistake: mistake.__name__)
def test_mistakes_in_files_are_found_before_the_first_iteration(
    sections: Sections, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: Any
) -> None:
    mistake(sections, tmp_path)
    assert_matches(refused(capsys, "--config", write(tmp_path, sections)), FILES[mistake].format(tmp_path))
    rows = Path(sections["logging"]["run_dir"]) / "metrics.jsonl"
    assert not rows.exists() or len(rows.read_text().splitlines()) == 3


@pytest.mark.parametrize("mistake", NEEDING_A_GPU, ids=lambda mistake: mistake.__name__)
def test_what_needs_a_gpu_is_refused_without_one(
    sections: Sections, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: Any
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    mistake(sections, tmp_path)
    assert_matches(refused(capsys, "--config", write(tmp_path, sections)), NEEDING_A_GPU[mistake])


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["nan", "1", "auto", "none", "2024-01-01", "~", "0x1F", "1e3"]),
    st.dates(),
    st.binary(max_size=3),
    st.lists(st.none() | st.integers(-2, 20) | st.text(max_size=2), max_size=4),
    st.dictionaries(st.text(max_size=2) | st.integers(), st.integers(), max_size=2),
)


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A valid config file with a few values replaced (some by the section's own), keys misspelt, or bytes changed."""
    defaults = dataclasses.asdict(Config())
    config: dict[Any, Any] = tiny_sections(Path("run"), Path("corpus"))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        section = draw(st.sampled_from(sorted(defaults)))
        kind = draw(st.integers(0, 12))
        if kind == 0:
            config[section] = draw(ANYTHING)
        elif kind == 1:
            config[draw(st.text(max_size=4) | st.none() | st.integers())] = draw(ANYTHING)
        elif isinstance(config.setdefault(section, {}), dict):
            name = draw(st.sampled_from(sorted(defaults[section])))
            value = draw(st.sampled_from(list(defaults[section].values()))) if kind > 6 else draw(ANYTHING)
            config[section][f"{name}s" if kind == 2 else name] = value
    content = bytearray(yaml.safe_dump(config).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 0, 1, 3]))):
        position = draw(st.integers(0, len(content) - 1))
        content[position : position + draw(st.integers(0, 20))] = draw(st.binary(max_size=3))
    return bytes(content)


@pytest.mark.slow
def test_a_mutated_config_file_is_valid_or_refused_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "pretrain", lambda config, tasks_of: validate(config, world_size=1) or 0)
    monkeypatch.setattr(pretrain, "pretrain_parser", functools.cache(pretrain.pretrain_parser))  # slow to build
    outcomes: Counter[int | str | None] = Counter()

    @seed(1)
    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutated_files())
    def check(content: bytes) -> None:
        status = command("pretrain", "--config", write(tmp_path, content))
        outcomes[status] += 1
        printed = capsys.readouterr().err
        assert (status == 0) or (status == 2 and "megatron-sbld: error: " in printed and "Traceback" not in printed)

    check()
    assert sum(outcomes.values()) >= 300
    assert min(outcomes[0], outcomes[2]) >= 3  # the draws shift with each new field


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, made longer, overwritten in places, or replaced."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return content[: draw(st.integers(0, len(content)))]
    if kind == 1:
        return content + draw(st.binary(min_size=1, max_size=20))
    if kind == 2:
        return draw(st.binary(max_size=60))
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(changed) - 1))
        changed[position : position + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(changed)


def corrupt_and_read(original: Path, target: Path, read: Any, examples: int = 150) -> Counter[str]:
    """Read damaged versions of a file; what happened, by outcome. Only a ValueError with a message may happen."""
    content, outcomes = original.read_bytes(), Counter()

    @seed(2)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged(content))
    def check(damage: bytes) -> None:
        target.write_bytes(damage)
        try:
            read()
        except ValueError as error:
            outcomes["refused" if str(error) else "refused without a message"] += 1
        else:
            outcomes["read"] += 1

    check()
    target.write_bytes(content)
    assert not outcomes["refused without a message"]
    return outcomes


@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_a_damaged_data_set_is_read_or_refused_with_a_message(sections: Sections, tmp_path: Path, suffix: str) -> None:
    prefix = f"{use_copy_of_corpus(sections, tmp_path)}_train"
    path = Path(f"{prefix}.{suffix}")
    assert corrupt_and_read(path, path, lambda: verify_dataset(prefix))["refused"] > 50


def test_a_damaged_sensitivity_file_is_read_or_refused_with_a_message(tmp_path: Path) -> None:
    path = Path(write_sensitivity(tmp_path))
    assert corrupt_and_read(path, path, lambda: SensitivityFile.load(path))["refused"] > 50


@pytest.mark.parametrize("name", ["checkpoint.json", ".metadata", "metadata.json"])
def test_a_damaged_checkpoint_is_read_skipped_or_refused_with_a_message(
    shared: Path, tmp_path: Path, name: str, sections: Sections
) -> None:
    shutil.copytree(shared / "done", tmp_path / "run")
    config = in_folder(tiny_run(tmp_path, shared / "corpus"), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "iter_0000003" / name
    tokenizer, data = load_tokenizer("byte"), find_data(config)
    outcomes = corrupt_and_read(path, path, lambda: find_start(config, tokenizer, data))
    assert sum(outcomes.values()) >= 100


def test_a_manifest_with_another_train_state_is_refused_by_the_trainer(
    sections: Sections, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(sections, tmp_path)
    manifest = tmp_path / "run" / "checkpoints" / "iter_0000003" / "checkpoint.json"
    content = json.loads(manifest.read_text())
    for key, value in (("drop", None), ("consumed_samples", "many"), ("config", 7)):
        train_state = {**content["train_state"], key: value}
        manifest.write_text(json.dumps({**content, "train_state": train_state}))
        assert "checkpoint" in refused(capsys, "--config", write(tmp_path, sections))
