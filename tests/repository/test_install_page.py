"""What the page on installing promises and no other test would miss."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "install.md"


def test_the_install_that_leaves_torch_alone_names_every_other_dependency() -> None:
    required = [line for line in metadata.requires("megatron-sbld") or [] if "extra ==" not in line]
    names = {re.split(r"[\[<>=!~; (]", line, maxsplit=1)[0] for line in required}
    (command,) = re.findall(r'pip install ("jsonargparse.*)', PAGE.read_text())
    given = {word.partition("[")[0] for word in command.replace('"', "").split()}
    assert given == names - {"torch", "megatron-core", "numpy"}, "these are there or named before"
