"""`megatron-sbld doctor`."""

from __future__ import annotations

from argparse import ArgumentParser

from megatron_sbld.cli.command import Command


def _doctor(args: list[str]) -> int:
    from megatron_sbld import doctor

    return doctor.main(args)


def _parser() -> ArgumentParser:
    """The option of doctor's own parser, for tab completion."""
    parser = ArgumentParser()
    parser.add_argument("--json", action="store_true")
    return parser


COMMAND = Command(
    "doctor", "what is installed here, what will be used, what is missing and how to fix it", _doctor, parser=_parser
)
