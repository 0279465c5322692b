"""Every benchmark answers --help, as a program from another folder, and benchmarks/README.md tells of each."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import megatron_sbld  # noqa: F401  found before the repository is taken off the path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
PROGRAMS = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "__init__.py")
ROWS = [line.strip("| ").split(" | ") for line in README.splitlines() if re.match(r"\| \[\w+\.py\]", line)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_benchmark_answers_help_from_another_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, with nothing of the repository on the path: starting a process for each takes a minute."""
    for module in [module for module in sys.modules if module.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder).resolve() != ROOT])
    monkeypatch.setattr(sys, "argv", [str(FOLDER / name), "--help"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert ended.value.code in (None, 0)
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {name}")
    assert f"python benchmarks/{name}" in shown, "its docstring has a command"


def test_the_table_has_a_row_for_each_benchmark_with_its_command_and_newest_result() -> None:
    assert sorted(row[0] for row in ROWS) == [f"[{name}]({name})" for name in PROGRAMS]
    for (_, question, command, result), name in zip(sorted(ROWS), PROGRAMS, strict=True):
        assert question.partition(" (")[0].endswith("?"), name
        assert command.startswith(f"`python benchmarks/{name}"), name
        assert re.search(r"\(\[([^]]+, )?\d{4}-\d\d-\d\d\]\(results/\w+\.md\)\)$", result), name


def test_every_file_that_is_named_exists_and_every_page_of_results_is_named() -> None:
    links = set(re.findall(r"\]\(([^)]+)\)", README))
    assert [link for link in links if not (FOLDER / link).exists()] == []
    pages = {f"results/{path.name}" for path in (FOLDER / "results").glob("*.md")}
    assert pages <= links
