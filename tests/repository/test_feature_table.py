"""docs/compatibility_evidence.md is true: each test that it names exists, and it refuses what the code refuses."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "compatibility_evidence.md"
STATUSES = {"tested", "GPU only", "refused"}
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::([^`]+)`")


def rows() -> list[tuple[str, str, str]]:
    """(switch, status, evidence) of every row of the page's tables."""
    cells = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in TABLE.read_text().splitlines()
        if line.startswith("|")
    ]
    return [row for row in cells if row[0] != "Switch" and not row[0].startswith("---")]


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """The test functions of a file and the keys of its module-level dictionaries of cases."""
    names: set[str] = set()
    for statement in ast.parse(path.read_text()).body:
        if isinstance(statement, ast.FunctionDef) and statement.name.startswith("test_"):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Dict):
            names |= {str(key.value) for key in statement.value.keys if isinstance(key, ast.Constant)}
    return frozenset(names)


def refusal_reasons() -> dict[str, str]:
    """REASONS of refusals.py, read without importing Megatron."""
    module = ast.parse((ROOT / "megatron_sbld" / "mcore" / "skip" / "refusals.py").read_text())
    for statement in module.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "REASONS":
            return ast.literal_eval(statement.value)
    raise AssertionError("refusals.py has no REASONS")


def test_the_page_has_no_other_status() -> None:
    assert len(rows()) > 50
    assert all(len(row) == 3 for row in rows())
    assert {status for _, status, _ in rows()} <= STATUSES


@pytest.mark.parametrize(("switch", "status", "evidence"), rows(), ids=[switch[:60] for switch, _, _ in rows()])
def test_each_row_has_its_evidence(switch: str, status: str, evidence: str) -> None:
    references = REFERENCE.findall(evidence)
    assert evidence.count("`tests/") == len(references), "a reference is FILE::NAME"
    for path, name in references:
        assert (ROOT / path).is_file(), path
        assert name in names_in(ROOT / path), f"{path} has no test or case {name!r}"
    if status == "tested":
        assert references
    elif status == "GPU only":
        assert len(evidence) > 20
    else:
        assert references or evidence in refusal_reasons().values()


def test_every_switch_that_the_code_refuses_is_listed_with_its_reason() -> None:
    refused = {switch: evidence for switch, status, evidence in rows() if status == "refused"}
    for name, reason in refusal_reasons().items():
        assert [text for switch, text in refused.items() if f"`{name}`" in switch] == [reason], name


def test_messages_of_other_refusals_are_those_of_the_code() -> None:
    """Every refusal that is not in REASONS quotes its message up to the first reference."""
    sources = "".join(
        re.sub(r'"\s*\n\s*f?"', "", (ROOT / "megatron_sbld" / name).read_text())
        for name in (
            "mcore/skip/refusals.py",
            "mcore/skip/switchable.py",
            "mcore/skip/samples.py",
            "method/combinations.py",
            "config/combinations.py",
        )
    )
    for switch, status, evidence in rows():
        if status == "refused" and evidence not in refusal_reasons().values() and "FSDP alone" not in evidence:
            message = evidence.split(" `tests/")[0].rstrip(".")
            assert message in sources, switch
