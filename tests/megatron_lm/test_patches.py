"""The patches against a real Megatron-LM checkout, where there is one; and what can be said of them without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PATCHES = sorted((REPOSITORY / "patches" / "megatron-lm").glob("*/*.patch"))
CHECKOUT = os.environ.get("MEGATRON_LM_DIR")


@pytest.mark.skipif(CHECKOUT is None, reason="needs a Megatron-LM checkout in MEGATRON_LM_DIR, and there is none")
@pytest.mark.timeout(3600)
def test_the_patch_of_the_checkout_holds_what_it_promises() -> None:
    script = REPOSITORY / "scripts" / "check_patches.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all well\n")


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_a_patch_carries_one_line_of_megatron_lm_and_two_of_ours(patch: Path) -> None:
    lines = patch.read_text().splitlines()
    body = lines[next(index for index, line in enumerate(lines) if line.startswith("@@")) + 1 :]
    added = [line for line in body if line.startswith("+")]
    context = [line for line in body if line.startswith(" ") and line.strip()]
    assert len(PATCHES) == 6
    assert (len(added), len(context)) == (2, 1)
    assert not any(line.startswith("-") for line in body)
    assert "from megatron_sbld.megatron_lm import with_layer_dropping" in added[0]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_each_patch_is_in_the_readme(patch: Path) -> None:
    readme = (REPOSITORY / "patches" / "README.md").read_text()
    assert re.search(rf"git apply \S*{re.escape(str(patch.relative_to(REPOSITORY)))}", readme)
    assert patch.parent.name in (REPOSITORY / "scripts" / "check_patches.sh").read_text()
