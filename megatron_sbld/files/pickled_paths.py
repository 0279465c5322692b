"""Paths in pickles between Pythons: 3.13 pickles them by the name of a module that those before it lack."""

from __future__ import annotations

import pathlib
import sys


def read_paths_of_python_3_13() -> None:
    """Let pickles with paths that Python 3.13 wrote be read; torch puts one into a checkpoint's table of contents."""
    if sys.version_info < (3, 13):
        sys.modules.setdefault("pathlib._local", pathlib)
