"""`megatron-sbld doctor`."""

from __future__ import annotations

from megatron_sbld.cli.command import Command


def _doctor(args: list[str]) -> int:
    from megatron_sbld import doctor

    return doctor.main(args)


COMMAND = Command("doctor", "what is installed here, what will be used, what is missing and how to fix it", _doctor)
