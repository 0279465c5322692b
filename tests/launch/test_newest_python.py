"""Which Python `.ci/newest-python` gives `make test-newest`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "newest-python"


def program(path: Path, status: int) -> Path:
    """What `usable` runs, and gets this exit status from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)
    return path


def find(root: Path, path: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYENV_ROOT": str(root), "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([SCRIPT], env=environ, capture_output=True, text=True, check=False)


def test_the_newest_of_pyenvs_own_comes_first(tmp_path: Path) -> None:
    versions = tmp_path / "pyenv" / "versions"
    for version in ("3.12.9", "3.13.2", "3.13.10"):
        program(versions / version / "bin" / "python", 0)
    assert find(tmp_path / "pyenv", tmp_path).stdout == f"{versions}/3.13.10/bin/python\n"
    program(versions / "3.13.10" / "bin" / "python", 1)
    assert find(tmp_path / "pyenv", tmp_path).stdout == f"{versions}/3.13.2/bin/python\n"


def test_one_on_the_path_is_taken_and_none_is_an_error_by_name(tmp_path: Path) -> None:
    path = tmp_path / "bin"
    for name in ("python3.13", "python3.12", "apt-cache"):
        program(path / name, 1)
    found = find(tmp_path, path)
    if found.returncode:  # else this machine has one at /usr/bin
        assert "needs Python 3.13 or 3.12 (but not 3.12.1)" in found.stderr
    program(path / "python3.13", 0)
    assert find(tmp_path, path).stdout == "python3.13\n"
