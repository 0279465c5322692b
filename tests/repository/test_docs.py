"""The documentation: links lead somewhere, every page is found, generated pages are current, figures match.

Figures of README.md, docs/results.md and docs/recipes.md are held against the pages of results that stand beside them.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import megatron_sbld

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = (
    *("*.md", "docs/*.md", "benchmarks/README.md", "benchmarks/results/*.md"),
    *("examples/**/*.md", "patches/README.md", "scripts/README.md"),
)
PAGES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![\w.,/])[-+]?\d[\d,]*(?:\.\d+)?(?![\w/])")
"""Not parts of names, paths, dates or versions."""


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)


def links(page: Path) -> list[str]:
    """Links to files, and the entries of tables of contents."""
    text = page.read_text(encoding="utf-8")
    found = [link for link in LINK.findall(prose(text)) if "://" not in link]
    for block in re.findall(r"^```\{toctree\}\n(.*?)^```$", text, re.M | re.S):
        names = [line.partition("<")[2].rstrip(">") or line for line in block.split() if not line.startswith(":")]
        for name in (name for name in names if (page.parent / f"{name}.md").is_file()):
            found.append(f"{name}.md")
    return found


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
            waiting += [target for target in targets if target.suffix == ".md" and target.is_file()]
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", ["options.md", "compatibility.md"])
def test_generated_pages_are_current(name: str) -> None:
    expected = module(ROOT / "docs" / "generate.py").pages()[name]
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == expected, "run `python docs/generate.py`"


def test_every_public_name_is_on_the_api_page() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = {name.rpartition(".")[2] for name in re.findall(r"\{autodoc2-object\} (\S+)", page)}
    assert documented == set(megatron_sbld.__all__) - {"__version__"}


def test_the_messages_that_are_explained_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.split("## Messages")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_sbld").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)
    assert len(quoted) > 5
    assert [message for message in quoted if message not in joined] == []


# Figures


def values(text: str) -> list[tuple[float, int]]:
    """The numbers of a text, each with its number of decimals."""
    found = [number.replace(",", "") for number in NUMBER.findall(text)]
    return [(float(number), len(number.partition(".")[2])) for number in found]


def blocks_with_results(page: Path) -> list[tuple[str, str]]:
    """(text, text of the pages of results that it links to) of each list entry, or paragraph with its table."""
    found = []
    for paragraph in re.split(r"\n\n+(?!\|)|\n(?=- )", prose(page.read_text(encoding="utf-8"))):
        linked = [link for link in LINK.findall(paragraph) if "/results/" in link and link.endswith(".md")]
        if linked:
            source = "\n".join((page.parent / link).read_text(encoding="utf-8") for link in linked)
            found.append((LINK.sub(lambda match: match[0].partition("](")[0], paragraph), source))
    return found


def missing_figures(text: str, source: str) -> list[float]:
    """Numbers of a text that no number of the source rounds to."""
    known = {value for value, _ in values(source)}
    return [
        value
        for value, decimals in values(text)
        if not any(abs(abs(value) - abs(other)) <= 0.5001 * 10.0**-decimals for other in known)
    ]


@pytest.mark.parametrize("name", ["README.md", "docs/results.md", "docs/recipes.md"])
def test_figures_are_those_of_the_pages_of_results(name: str) -> None:
    blocks = blocks_with_results(ROOT / name)
    assert len(blocks) >= 3
    for text, source in blocks:
        assert missing_figures(text, source) == [], text


def test_a_figure_that_differs_is_found() -> None:
    source = "| pld | 3,573 | +0.0416 | 76.1% |"
    assert missing_figures("PLD: 3,573 tokens/s, +0.042, 76 %", source) == []
    assert missing_figures("PLD: 3,574 tokens/s, +0.052, 76.3 %", source) == [3574, 0.052, 76.3]


# Docstrings on the API pages


@pytest.mark.parametrize(
    ("docstring", "found"),
    [
        (
            "Does it.\n\nArgs:\n    a: one,\n        still.\n    b: two.",
            "Does it.\n\n:param a: one, still.\n:param b: two.\n",
        ),
        ("Does it.\n\na, b: one.\nc: two.", "Does it.\n\n:param a, b: one.\n:param c: two.\n"),
        ("Does it.\n\nRaises:\n    ValueError: why.", "Does it.\n\n:raises ValueError: why.\n"),
        ("Does it.\n\nReturns:\n    What, and\n    why.", "Does it.\n\n:return: What, and why.\n"),
        ("Does it.\n\n>>> f(1)\n2", "Does it.\n\n```python\n>>> f(1)\n2\n```\n"),
        ("One: two. Three\nfour: five.", "One: two. Three\nfour: five.\n"),
    ],
)
def test_docstrings_become_field_lists(docstring: str, found: str) -> None:
    pytest.importorskip("myst_parser", reason="needs the extra docs")
    assert module(ROOT / "docs" / "docstrings.py").to_myst(docstring) == found
