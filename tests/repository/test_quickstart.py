"""What `make quickstart` does around its training runs; the runs themselves are the trainer's tests."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

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
    command = quickstart.pretrain(Path("corpus"), Path("run"), [], None)
    assert command[command.index("--nproc-per-node") + 1] == processes
    assert ("bf16" in command) == bf16


@pytest.mark.parametrize("args", [[], ["--measure"]])
def test_the_sensitivity_is_measured_first_on_request_alone(quickstart, monkeypatch, tmp_path, args):
    commands = []
    monkeypatch.setattr(quickstart, "run_step", lambda title, command: commands.append(command))
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
