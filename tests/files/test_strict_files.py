"""YAML and JSON that users write: nothing is given twice, and a number is what it looks like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_sbld.cli import main as cli
from megatron_sbld.cli.parser import parse_config
from megatron_sbld.cli.pretrain import pretrain_parser
from megatron_sbld.config.files import read_config
from megatron_sbld.files.strict_json import load_json
from megatron_sbld.files.strict_yaml import dump_yaml, load_yaml
from megatron_sbld.predict.hardware import load_hardware
from megatron_sbld.sensitivity.file import SensitivityFile

TEXTS = [
    "1e-3",
    "0o17",
    "0100",
    "1_000",
    "1:30",
    "yes",
    "null",
    "~",
    "2024-01-01",
    ".5",
    "<<",
    "",
    "a: b",
    "1e5",
    "0x1",
]


def read(folder: Path, text: str):
    path = folder / "config.yaml"
    path.write_text(text)
    return read_config(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  num_layers: 2\ndrop: {}\nmodel:\n  hidden_size: 8\n", "model is given twice, in lines 1 and 4"),
        ("model:\n  num_layers: 2\n\n  num_layers: 3\n", "model.num_layers is given twice, in lines 2 and 4"),
        ("data: {train_data_path: [{a: 1, a: 2}]}", r"data.train_data_path\[1\].a is given twice, in lines 1 and 1"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_lines(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"config file .*config.yaml: {message}: leave one out"):
        read(tmp_path, text)


def test_anchors_aliases_and_merge_keys_work_and_a_merged_key_may_be_given_anew(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "data: {train_data_path: &corpus [a, b], valid_data_path: *corpus}\n"
        "model: &sizes {hidden_size: 64, num_layers: 2}\n",
    )
    assert config.data.valid_data_path == ["a", "b"]
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}
    assert load_yaml("a: &a {b: *a}")["a"]["b"], "one that holds itself ends as well"


def test_of_merged_mappings_the_first_one_wins_whatever_the_key(tmp_path: Path) -> None:
    for key in ("x", "train_iters", "'two words'"):
        name = key.strip("'")
        first, second = f"{{{key}: 1}}", f"{{{key}: 2, y: 2}}"
        assert load_yaml(f"a: {{<<: [{first}, {second}]}}") == {"a": {name: 1, "y": 2}}
        assert load_yaml(f"a: {{<<: [{first}, {second}], {key}: 3}}") == {"a": {name: 3, "y": 2}}
        assert load_yaml(f"a: {{<<: {{<<: {second}, {key}: 1}}}}") == {"a": {name: 1, "y": 2}}
    with pytest.raises(ValueError, match=r"training.<< is given twice, in lines 1 and 1: write <<: \[first, second\]"):
        read(tmp_path, "training: {<<: {train_iters: 1}, <<: {train_iters: 2}}")
    for text in ("training: {<<: 5}", "training: {<<: [{}, 5]}"):
        with pytest.raises(ValueError, match="what is merged in line 1 must be a mapping or a list of mappings"):
            read(tmp_path, text)
    with pytest.raises(ValueError, match="unknown field training"):
        read(tmp_path, "training: &a {<<: *a, self: 1}")


@pytest.mark.parametrize(
    ("number", "instead"),
    [
        ("0100", r"100 or 64 \(octal\)"),
        ("0o100", "64"),
        ("0x40", "64"),
        ("0b11", "3"),
        ("1_000", "1000"),
        ("1:30", "90"),
        ("-010", r"-10 or -8 \(octal\)"),
        ("08", "8"),
    ],
)
def test_a_number_in_another_notation_is_refused_with_what_to_write(
    tmp_path: Path, number: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = f"{number} is not allowed: write a number in decimal digits, .* as {instead}; write text in quotes"
    with pytest.raises(ValueError, match=rf"training.train_iters \(line 2\): {allowed}"):
        read(tmp_path, f"training:\n  train_iters: {number}\n")
    for given in ([f"--training.train_iters={number}"], ["--training.train_iters", number]):
        with pytest.raises(SystemExit):
            cli.main(["schedule", "show", *given])
        assert f"--training.train_iters: {number} is not allowed" in capsys.readouterr().err


def test_plain_numbers_and_words_are_what_they_look_like(tmp_path: Path) -> None:
    text = """
        optimizer: {lr: 1e-5, min_lr: .0, adam_eps: 1.E-8, weight_decay: +0.1}
        logging: {wandb_project: on, wandb_name: 2026-01-01, run_dir: "0100"}
        parallel: {sequence_parallel: yes, overlap_grad_reduce: false}
        training: {train_iters: 100, initial_loss_scale: 1e3}
    """
    config = read(tmp_path, text)
    opt, logging = config.optimizer, config.logging
    assert (opt.lr, opt.min_lr, opt.adam_eps, opt.weight_decay) == (1e-5, 0.0, 1e-8, 0.1)
    assert (logging.wandb_project, logging.wandb_name, logging.run_dir) == ("on", "2026-01-01", "0100")
    assert (config.parallel.sequence_parallel, config.parallel.overlap_grad_reduce) == (True, False)


@pytest.mark.parametrize("weights", ["[0.3, a, 7, b]", "['0.3', a, '7', b]"])
def test_the_weights_of_a_blend_may_be_numbers(tmp_path: Path, weights: str) -> None:
    assert read(tmp_path, f"data: {{train_data_path: {weights}}}").data.train_data_path == ["0.3", "a", "7", "b"]
    for given in ([f"--data.train_data_path={weights}"], ["--data.train_data_path", weights]):
        config, _ = parse_config(pretrain_parser(), given)
        assert config.data.train_data_path == ["0.3", "a", "7", "b"]
    (tmp_path / "config.yaml").write_text("data: {train_data_path: [1, c]}")
    args = ["--config", str(tmp_path / "config.yaml"), "--data.train_data_path+", weights]
    config, _ = parse_config(pretrain_parser(), args)
    assert config.data.train_data_path == ["1", "c", "0.3", "a", "7", "b"]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400"])
def test_a_number_without_bounds_is_told_so(tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(f"optimizer: {{lr: {value}}}\ntraining: {{train_iters: 5}}")
    with pytest.raises(SystemExit) as ended:
        cli.main(["schedule", "show", "--config", str(tmp_path / "config.yaml")])
    assert ended.value.code == 2
    assert "must be a number in (0, inf), and finite" in capsys.readouterr().err


@pytest.mark.parametrize("text", TEXTS)
def test_written_text_comes_back_as_text_for_any_reader(text: str) -> None:
    written = dump_yaml({"a": [text, 1, 0.5, 1e-5, None, True]})
    assert load_yaml(written) == yaml.safe_load(written) == {"a": [text, 1, 0.5, 1e-5, None, True]}


def test_hardware_and_sensitivity_files_are_as_strict(tmp_path: Path) -> None:
    hardware, gaps = tmp_path / "gpu.yaml", tmp_path / "gaps.json"
    hardware.write_text("peak_tflops: 1\nmemory_gb: 2\npeak_tflops: 3\n")
    with pytest.raises(ValueError, match=r"--hardware .*gpu.yaml: peak_tflops is given twice, in lines 1 and 3"):
        load_hardware(str(hardware))
    SensitivityFile.from_gaps([0.1, 0.2], [0.0, 0.0], {}).save(gaps)
    gaps.write_text(gaps.read_text().replace('"gap": [', '"gap": [0.2, 0.3],\n  "gap": [', 1))
    with pytest.raises(ValueError, match=r"gaps.json: gap is given twice, in lines 4 and 5"):
        SensitivityFile.load(gaps)


def test_json_without_repetition_is_json() -> None:
    text = '{"a": {"b": 1}, "c": [{"b": 2}, {"b": 3}], "é": null}'
    assert load_json(text) == json.loads(text)
    with pytest.raises(json.JSONDecodeError):
        load_json("{")
