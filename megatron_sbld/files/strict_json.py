"""JSON files that users may edit: nothing is given twice. Standard library only."""

from __future__ import annotations

import json
import re
from typing import Any


def load_json(text: str) -> Any:
    """What the text stands for.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ValueError: a key stands twice in an object, with the lines that have it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{key} is given twice, in lines {_lines(text, key)}: leave one out")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=unique)


def _lines(text: str, key: str) -> str:
    """The numbers of the lines that have the key, in any object."""
    starts = [match.start() for match in re.finditer(rf"{re.escape(json.dumps(key))}\s*:", text)]
    return " and ".join(str(text.count("\n", 0, start) + 1) for start in starts) or "that it does not name plainly"
