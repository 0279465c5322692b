"""What `megatron-sbld doctor` finds, and the table that it prints of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the report."""

    section: str
    name: str
    value: str
    status: Literal["ok", "absent", "missing", "broken"] = "ok"
    """absent: optional; missing: needed, or faster with it; broken: there, but it cannot be used."""
    mend: str = ""
    """What to do about it, mostly a command."""


def table(findings: Sequence[Finding]) -> str:
    """The findings by section, and below them what to do."""
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += [*([""] if lines else []), section]
        mark = {"ok": "", "absent": "", "missing": "! ", "broken": "BROKEN: "}[finding.status]
        lines.append(f"  {finding.name:<{width}}  {mark}{finding.value}")
    mends = [f"  {finding.name}: {finding.mend}" for finding in findings if finding.mend]
    return "\n".join([*lines, *(["", "to do", *mends] if mends else [])])
