"""The files of a measurement: continued, refused, merged; and the commands that read sensitivity files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sbld.cli import main as cli
from megatron_sbld.report import sensitivity as report
from megatron_sbld.sensitivity.file import SensitivityFile
from megatron_sbld.sensitivity.measurement import LayerRun, MeasurementFolder, Request, sensitivity_of

LAYERS, N = 6, 30
GAPS = {1: 0.5, 2: 0.01, 3: 0.2, 4: 0.1, 5: -0.1, 6: 0.3}
SEEDS = [1, 2]


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {
        "settings": {"optimizer.lr": 0.1, "--iterations": N},
        "num_layers": LAYERS,
        "method": "train",
        "seeds": SEEDS,
        "window": 10,
        "block_fraction": 0.17,
        "allow_fraction": 0.34,
        "about": {
            "command": "megatron-sbld sensitivity measure",
            "commit": "abc",
            "hardware": "2 CPU cores",
            "date": "today",
        },
    }
    return Request(**{**values, **changes})


def run(seed: int, gap: float) -> LayerRun:
    values = 3.0 + np.random.default_rng(seed).normal(0, 0.01, N) + gap
    return LayerRun(values=values.tolist(), cost_iterations=float(N), seconds=1.0)


def folder(path: Path, layers: list[int], **changes: Any) -> MeasurementFolder:
    """A measurement of some layers with every seed; batches have the same noise with and without a layer."""
    made = MeasurementFolder.open(path, request(**changes))
    for seed in made.request.seeds:
        made.add(seed, None, run(seed, 0.0))
        for layer in layers:
            made.add(seed, layer, run(seed, GAPS[layer] + 0.001 * seed))
    return made


def test_gaps_are_differences_to_the_baseline_averaged_over_seeds(tmp_path: Path) -> None:
    found = sensitivity_of([folder(tmp_path, list(GAPS))])
    np.testing.assert_allclose(found.gap, [gap + 0.0015 for gap in GAPS.values()])
    np.testing.assert_allclose(found.gap_stderr, 0.0005)  # the spread over seeds; within a run there is none
    assert (found.block, found.allow) == ((1,), (5,))
    assert found.measured_with["cost_iterations"] == 2 * 7 * N
    assert found.measured_with["gaps_by_seed"]["2"] == pytest.approx([gap + 0.002 for gap in GAPS.values()])


def test_parts_merged_equal_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = sensitivity_of([folder(tmp_path / "whole", list(GAPS))])
    folder(tmp_path / "a", [1, 2, 6])
    folder(tmp_path / "b", [3, 4, 5])
    output = tmp_path / "merged.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["sensitivity", "merge", str(tmp_path / "b"), str(tmp_path / "a"), "--output", str(output)])
    assert ended.value.code == 0
    merged = SensitivityFile.load(output)
    for name in ("gap", "gap_stderr", "sensitivity", "block", "allow"):
        assert getattr(merged, name) == getattr(whole, name)
    assert [part["layers"] for part in merged.measured_with["parts"]] == [[3, 4, 5], [1, 2, 6]]
    assert merged.measured_with["cost_iterations"] == 2 * 8 * N


def test_parts_that_do_not_fit_together_are_refused_by_name(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", [1, 2, 3])
    mistakes = {
        "overlap": (folder(tmp_path / "b", [3, 4, 5, 6]), "layer 3 is in .*a and in .*b"),
        "lacking": (folder(tmp_path / "c", [4, 6]), r"layers \[5\] of 6 are not measured"),
        "settings": (
            folder(tmp_path / "d", [4, 5, 6], settings={"optimizer.lr": 0.2, "--iterations": N}),
            "different settings:\n  optimizer.lr: 0.1 and 0.2$",
        ),
        "window": (folder(tmp_path / "e", [4, 5, 6], window=20), "window: 10 and 20"),
        "seeds": (folder(tmp_path / "f", [4, 5, 6], seeds=[1]), r"seeds: \[1, 2\] and \[1\]"),
    }
    for other, message in mistakes.values():
        with pytest.raises(ValueError, match=message):
            sensitivity_of([first, other])


def test_a_layer_that_lacks_a_seed_is_not_measured(tmp_path: Path) -> None:
    made = folder(tmp_path, list(GAPS))
    (tmp_path / "seed-2" / "layer-04.json").unlink()
    assert made.layers() == [1, 2, 3, 5, 6]
    with pytest.raises(ValueError, match=r"layers \[4\] of 6"):
        sensitivity_of([made])


def test_a_folder_of_other_settings_is_refused_by_field_and_left_as_it_is(tmp_path: Path) -> None:
    folder(tmp_path, [1])
    before = (tmp_path / "profile.json").read_bytes()
    with pytest.raises(ValueError, match=r"other settings.*\n  optimizer\.lr: 0\.1 there, 0\.3 now"):
        MeasurementFolder.open(tmp_path, request(settings={"optimizer.lr": 0.3, "--iterations": N}))
    assert (tmp_path / "profile.json").read_bytes() == before
    assert MeasurementFolder.open(tmp_path, request(window=20)).request.window == 20


def test_a_run_from_another_folder_is_found_out(tmp_path: Path) -> None:
    made = folder(tmp_path / "a", [1])
    other = folder(tmp_path / "b", [1], settings={"optimizer.lr": 0.3})
    name = Path("seed-1") / "layer-01.json"
    (made.path / name).write_bytes((other.path / name).read_bytes())
    with pytest.raises(ValueError, match=r"layer-01\.json was measured with other settings"):
        made.run(1, 1)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format": "megatron-sbld-profile-1", "colour": 1}'])
def test_a_damaged_folder_is_refused_with_its_file(tmp_path: Path, content: str) -> None:
    folder(tmp_path, [1])
    (tmp_path / "profile.json").write_text(content)
    with pytest.raises(ValueError, match=r"profile\.json"):
        MeasurementFolder.read(tmp_path)


def test_a_run_that_ended_early_has_a_gap_between_its_neighbours(tmp_path: Path) -> None:
    made = folder(tmp_path, list(GAPS), seeds=[1])
    early = dataclasses.replace(run(1, 0.25), values=run(1, 0.25).values[:20], neighbours=[3, 6], cost_iterations=20.0)
    made.add(1, 4, early)
    found = sensitivity_of([made])
    assert found.gap[3] == pytest.approx(0.25)
    assert found.measured_with["runs_stopped_early"] == 1
    assert found.measured_with["cost_iterations"] == 6 * N + 20


def test_influences_are_gaps_without_a_baseline_and_allow_none(tmp_path: Path) -> None:
    made = folder(tmp_path, list(GAPS), method="block_influence")
    found = sensitivity_of([made])
    assert found.gap[0] == pytest.approx(3.5, abs=0.02)
    assert found.allow == ()
    assert "Allow list stays empty" in found.measured_with["note"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    sensitivity_of([folder(tmp_path / "measured", list(GAPS))]).save(tmp_path / "sensitivity.json")
    return str(tmp_path / "sensitivity.json")


def command(*args: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    return ended.value.code


def test_show_prints_every_layer_and_draws_a_plot(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plots" / "gaps.png"
    assert command("sensitivity", "show", file, "--plot", str(plot)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == [str(layer) for layer in GAPS]
    assert any(line.split()[:2] == ["1", "+0.5015"] and line.split()[-1] == "Block" for line in lines if line.strip())
    assert any(line.split()[:2] == ["5", "-0.0985"] and line.split()[-1] == "Allow" for line in lines if line.strip())
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_outputs_never_overwrite_what_was_measured(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "measured"
    (tmp_path / "plot.png").hardlink_to(file)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for args in (
        ("merge", str(part), "--output", str(part / "profile.json")),
        ("merge", str(part), "--output", str(part / "seed-1" / "baseline.json")),
        ("lists", file, "--output", file),
        ("show", file, "--plot", str(tmp_path / "plot.png")),
    ):
        assert command("sensitivity", *args) == cli.EXIT_MISTAKE
        assert "is an input, and would be overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_sensitivity_file_may_begin_with_a_byte_order_mark(file: str, tmp_path: Path) -> None:
    marked = tmp_path / "marked.json"
    marked.write_bytes(b"\xef\xbb\xbf" + Path(file).read_bytes())
    assert SensitivityFile.load(marked) == SensitivityFile.load(file)


def test_lists_are_chosen_anew_from_the_same_gaps(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "folder" / "other.json"
    args = ["sensitivity", "lists", file, "--block", "0.5", "--allow", "0", "--output", str(output)]
    assert command(*args) == 0
    before, after = SensitivityFile.load(file), SensitivityFile.load(output)
    assert (after.block, after.allow) == ((1, 3, 6), ())
    assert dataclasses.replace(after, block=before.block, allow=before.allow) == before


def test_rank_compares_orders_and_costs(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = SensitivityFile.load(file)
    reverse = SensitivityFile.from_gaps([-gap for gap in measured.gap], measured.gap_stderr, {"method": "made up"})
    reverse.save(tmp_path / "reverse.json")
    assert command("sensitivity", "rank", file, str(tmp_path / "reverse.json")) == 0
    printed = capsys.readouterr().out
    assert "+1.000" in printed
    assert "-1.000" in printed
    assert "420" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rank", "FILE"], "give at least one file"),
        (["rank", "FILE", "nowhere.json"], "nowhere.json cannot be read"),
        (["show", "nowhere.json"], "nowhere.json cannot be read"),
        (["show", "FILE", "--plot", "gaps.pdf"], "must end in .png"),
        (["lists", "FILE", "--block", "1.5"], "block_fraction = 1.5"),
        (["lists", "FILE", "--block", "0.8", "--allow", "0.8"], "together they may be at most 1"),
        (["merge", "nowhere", "--output", "x.json"], r"nowhere/profile\.json, which .* writes, cannot be read"),
        (["merge", "FOLDER", "FOLDER", "--output", "x.json"], "named more than once"),
        (["merge", "FOLDER"], "output"),
    ],
)
def test_mistakes_end_in_one_message(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    places = {"FILE": file, "FOLDER": str(tmp_path / "measured")}
    assert command("sensitivity", *(places.get(arg, arg) for arg in args)) == cli.EXIT_MISTAKE
    printed = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in printed
    with pytest.raises(ValueError, match=message):
        raise ValueError(printed)


def test_a_file_of_another_depth_is_not_ranked(file: str, tmp_path: Path) -> None:
    SensitivityFile.from_gaps([0.0, 1.0], [0.1, 0.1], {}).save(tmp_path / "two.json")
    with pytest.raises(ValueError, match="for 2 layers"):
        report.rank(file, [str(tmp_path / "two.json")])


def test_what_is_stored_is_json_that_others_can_read(tmp_path: Path) -> None:
    folder(tmp_path, [1])
    content = json.loads((tmp_path / "seed-1" / "layer-01.json").read_text())
    assert len(content["values"]) == N
    assert not list(tmp_path.rglob("*.tmp"))
