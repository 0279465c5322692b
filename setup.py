"""Builds the residual add's libraries, nothing else: see csrc/build_libraries.py. All metadata is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "csrc")]  # pip's build backends do not put them there

from build_libraries import COMMANDS, EXTENSIONS  # noqa: E402

setup(ext_modules=EXTENSIONS, cmdclass=COMMANDS)
