"""docs/compatibility_evidence.md is true: each test that it names exists, and it refuses what the code refuses."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "compatibility_evidence.md"
VERSIONS = ("0.16", "0.17", "0.18", "0.19")
STATUSES = {"tested", "other version", "never tried", "refused", "-"}
Row = tuple[str, frozenset[str], str]
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::([^`]+)`")


def table() -> list[tuple[str, ...]]:
    """The cells of every row of the page's tables."""
    cells = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in TABLE.read_text().splitlines()
        if line.startswith("|")
    ]
    return [row for row in cells if row[0] != "Switch" and not row[0].startswith("---")]


def rows() -> list[Row]:
    """(switch, its status in the versions, evidence) of every row."""
    return [(switch, frozenset(statuses) - {"-"}, evidence) for switch, *statuses, evidence in table()]


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
    texts: dict[str, str] = {}
    for statement in module.body:
        if not isinstance(statement, ast.Assign):
            continue
        name = ast.unparse(statement.targets[0])
        if name == "REASONS":
            assert isinstance(statement.value, ast.Dict)
            items = zip(statement.value.keys, statement.value.values, strict=True)
            return {
                ast.literal_eval(key): texts.get(ast.unparse(value)) or ast.literal_eval(value) for key, value in items
            }
        if isinstance(statement.value, ast.Constant):
            texts[name] = statement.value.value
    raise AssertionError("refusals.py has no REASONS")


def test_the_page_has_no_other_status() -> None:
    assert len(table()) > 50
    assert all(len(row) == len(VERSIONS) + 2 for row in table())
    assert {status for _, *statuses, _ in table() for status in statuses} <= STATUSES


def test_each_table_has_a_column_for_each_version() -> None:
    heads = [line for line in TABLE.read_text().splitlines() if line.startswith("| Switch")]
    assert heads == [f"| Switch | {' | '.join(VERSIONS)} | Shown by, or why |"] * len(heads)


def test_no_switch_is_refused_in_one_version_and_run_in_another() -> None:
    """The refusals look at values, not at versions; what says `other version` is tested in another."""
    kinds = [{"refused"}, {"never tried"}, {"tested"}, {"tested", "other version"}]
    assert [switch for switch, statuses, _ in rows() if statuses not in kinds] == []


@pytest.mark.parametrize(("switch", "statuses", "evidence"), rows(), ids=[switch[:60] for switch, _, _ in rows()])
def test_each_row_has_its_evidence(switch: str, statuses: frozenset[str], evidence: str) -> None:
    references = REFERENCE.findall(evidence)
    assert evidence.count("`tests/") == len(references), "a reference is FILE::NAME"
    for path, name in references:
        assert (ROOT / path).is_file(), path
        assert name in names_in(ROOT / path), f"{path} has no test or case {name!r}"
    if "tested" in statuses:
        assert references
    elif "never tried" in statuses:
        assert len(evidence) > 20
    else:
        assert references or evidence in refusal_reasons().values()


def test_every_switch_that_the_code_refuses_is_listed_with_its_reason() -> None:
    refused = {switch: evidence for switch, statuses, evidence in rows() if "refused" in statuses}
    for name, reason in refusal_reasons().items():
        assert [text for switch, text in refused.items() if f"`{name}`" in switch] == [reason], name


def test_messages_of_other_refusals_are_those_of_the_code() -> None:
    """Every refusal that is not in REASONS quotes its message up to the first reference."""
    sources = "".join(
        re.sub(r'"\s*\n\s*f?"', "", (ROOT / "megatron_sbld" / name).read_text())
        for name in (
            "mcore/skip/refusals.py",
            "mcore/skip/switchable.py",
            "mcore/skip/decoder.py",
            "layout/units.py",
            "mcore/skip/samples.py",
            "mcore/skip/tokens.py",
            "method/combinations.py",
            "config/combinations.py",
        )
    )
    for switch, statuses, evidence in rows():
        if "refused" in statuses and evidence not in refusal_reasons().values() and "FSDP alone" not in evidence:
            message = evidence.split(" `tests/")[0].rstrip(".")
            assert message in sources, switch
