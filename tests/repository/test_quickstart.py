"""What `make quickstart` does around its training runs; the runs themselves are the trainer's tests."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sbld.config.flops import executed_flops, padded_vocab_size
from megatron_sbld.data.tokenizer import load_tokenizer
from megatron_sbld.method.build import build_policy

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_help_says_what_every_option_does():
    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert all(option in result.stdout for option in ("--text", "--iters", "--measure", "--out"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "nowhere"], "--text nowhere does not exist"),
        (["--iters", "0"], "--iters 0 is not allowed"),
        (["--out", "."], "--out . exists"),
    ],
)
def test_mistakes_on_the_command_line_are_named_before_anything_runs(quickstart, monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *args])
    with pytest.raises(SystemExit) as exit_info:
        quickstart.parse_args()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_failing_step_ends_the_script_with_its_status_and_names_the_command(quickstart, capfd):
    with pytest.raises(SystemExit) as exit_info:
        quickstart.run_step("1/1 fail", [sys.executable, "-c", "raise SystemExit(7)"])
    assert exit_info.value.code == 7
    assert "failed with exit status 7" in capfd.readouterr().err


def test_the_corpus_is_the_librarys_own_sources_in_a_fixed_order(quickstart):
    sources = list(quickstart.standard_library_sources())
    assert sources == sorted(sources)
    assert any(source.name == "argparse.py" for source in sources)
    assert not [source for source in sources if "site-packages" in source.parts or "test" in source.parts]


def test_two_calls_never_share_a_folder(quickstart, tmp_path):
    assert quickstart.make_folder(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(FileExistsError):
        quickstart.make_folder(tmp_path / "a")


@pytest.mark.parametrize(
    ("gpus", "processes", "bf16"), [(0, "2", False), (1, "1", True), (2, "2", True), (8, "2", True)]
)
def test_processes_and_precision_follow_the_gpus(quickstart, monkeypatch, gpus, processes, bf16):
    monkeypatch.setattr(quickstart.torch.cuda, "device_count", lambda: gpus)
    command = quickstart.pretrain(Path("corpus"), Path("run"), [], 160)
    assert command[command.index("--nproc-per-node") + 1] == processes
    assert ("bf16" in command) == bf16


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("iters", [None, 30, 1000])
def test_every_run_has_the_training_flops_of_the_undropped_one(quickstart, iters):
    flops = {}
    for name, options in quickstart.RUNS.items():
        length = quickstart.iterations_at_equal_compute(options, iters)
        config = quickstart.parsed(options)
        policy = build_policy(config.drop, config.model.num_layers, length, base_dir=quickstart.ROOT)
        kept = [policy.keep_probs(iteration).sum() for iteration in range(1, length + 1)]
        flops[name] = sum(executed_flops(config.model, quickstart.VOCAB_SIZE, 1, float(layers)) for layers in kept)
    assert all(found == pytest.approx(flops["undropped"], rel=1 / (iters or 160)) for found in flops.values())


def test_the_vocabulary_that_is_counted_is_that_of_bytes(quickstart):
    assert padded_vocab_size(load_tokenizer("byte").vocab_size, quickstart.parsed([])) == quickstart.VOCAB_SIZE


def test_every_run_decays_over_the_same_share(quickstart):
    for iters in (160, 287):
        command = quickstart.pretrain(Path("corpus"), Path("run"), [], iters)
        assert int(command[command.index("--optimizer.lr_wsd_decay_iters") + 1]) == iters // 5
    alone = quickstart.parsed([])
    assert alone.optimizer.lr_wsd_decay_iters == alone.training.train_iters // quickstart.DECAY
    assert alone.optimizer.lr_warmup_iters == alone.training.train_iters // quickstart.WARMUP


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("args", [[], ["--measure"]])
def test_the_sensitivity_is_measured_first_on_request_alone(quickstart, monkeypatch, tmp_path, args):
    commands = []

    def run_step(title, command):
        commands.append(command)
        if "sensitivity" in command:
            (tmp_path / "out" / "sensitivity").mkdir()
            shutil.copy(quickstart.ROOT / quickstart.SENSITIVITY, tmp_path / "out" / "sensitivity" / "sensitivity.json")

    monkeypatch.setattr(quickstart, "run_step", run_step)
    text = tmp_path / "text.txt"
    text.write_text("text")
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--text", str(text), "--out", str(out), "--iters", "30", *args])
    quickstart.main()
    measured = [command for command in commands if "sensitivity" in command]
    (trained,) = [command for command in commands if "--drop.sensitivity" in command]
    used = trained[trained.index("--drop.sensitivity") + 1]
    evaluated, compared = commands[-2:]
    assert ("evaluate" in evaluated, "compare" in compared) == (True, True)
    assert all(str(out / name) in evaluated for name in quickstart.RUNS)
    assert compared[-2:] == ["--realised", "false"], "runs one after another measure what else the machine does"
    if not args:
        assert (measured, used) == ([], quickstart.SENSITIVITY)
        return
    assert commands.index(measured[0]) == 1
    assert measured[0][measured[0].index("--iterations") + 1] == "30"
    assert used == str(out / "sensitivity" / "sensitivity.json")
