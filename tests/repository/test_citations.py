"""Every formula's citation leads somewhere: docs/method.md has the section, and nothing cites what does not ship."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = set(re.findall(r"^## (\d+)\.", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), re.M))
CITATION = re.compile(r"docs/method\.md,?\s+(?:sections?\s+)?(\d+(?:(?:,|\s+and)\s+\d+)*)")
FOLDERS = ("megatron_sbld", "csrc", "benchmarks", "tests", "scripts", "patches", "configs", "docs")
SUFFIXES = {".py", ".md", ".h", ".cu", ".cpp", ".sh", ".yaml"}


def sources() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return [path for path in found if path != Path(__file__)]


def test_every_cited_section_exists() -> None:
    cited = {
        section
        for path in sources()
        for citation in CITATION.findall(path.read_text(encoding="utf-8"))
        for section in re.findall(r"\d+", citation)
    }
    assert len(cited) >= 5
    assert cited <= SECTIONS


def test_nothing_cites_a_file_that_does_not_ship() -> None:
    stale = re.compile(r"equations\.md|\bpapers? 00\d|\(00\d[ ,;)]")
    for path in sources():
        assert not stale.search(path.read_text(encoding="utf-8")), path


def test_every_module_that_is_named_is_where_the_name_says() -> None:
    """A bare name is a neighbour's, the only one of that name in the package, or Megatron's."""
    package, core = ROOT / "megatron_sbld", Path(str(importlib.util.find_spec("megatron.core").origin)).parent
    of_megatron_lm = {"preprocess_data.py", "pretrain_gpt.py", "training/checkpointing.py"}
    wrong = []
    for path in package.rglob("*.py"):
        for name in re.findall(r"(?<![\w/{}])[\w/]*\w+\.py\b", path.read_text(encoding="utf-8")):
            places = [path.parent, package, ROOT, *core.parents]
            name = name.lstrip("/")
            known = name in of_megatron_lm or any((place / name).exists() for place in places)
            if not known and len(list(package.rglob(name))) != 1 and not any(core.rglob(name)):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert not wrong
