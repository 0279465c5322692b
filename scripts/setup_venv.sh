#!/usr/bin/env bash
# Sets up the virtual environment that the Makefile's targets use: VENV (folder), PYTHON (3.10+), TORCH (what pip installs),
# CORE (what pip installs as megatron-core, as megatron-core==0.19.2), EXTRAS (of pyproject.toml, as dev), COPY (not empty: install
# a copy, so that the libraries that another environment built in this folder stay as they are).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${VENV:=.venv}" "${TORCH:=torch==2.13.0}" "${CORE:=}" "${EXTRAS:=}" "${COPY:=}"

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "error: $PYTHON is $("$PYTHON" --version 2>&1); Python 3.10 or newer is needed (set PYTHON=...)" >&2
  exit 1
}
if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
  # Debian and Ubuntu keep venv in a package of its own.
  package="python$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  echo "$PYTHON has no venv module; installing $package"
  sudo=""
  [ "$(id -u)" = 0 ] || sudo=sudo
  if ! { $sudo apt-get update -qq && $sudo apt-get install -y -qq "$package"; }; then
    echo "error: could not install $package; install it and run again" >&2
    exit 1
  fi
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --upgrade pip
# shellcheck disable=SC2086  # TORCH may carry options
"$VENV/bin/python" -m pip install --quiet $TORCH
if [ "${MEGATRON_SBLD_CUDA:-auto}" = force ]; then
  # A compiler where the machine has none, and what the tests read machine code with.
  [ -n "${CUDA_HOME:-}" ] || command -v nvcc >/dev/null || "$VENV/bin/python" -m pip install --quiet --group nvcc
  "$VENV/bin/python" -m pip install --quiet --group disassembler
fi
package=".${EXTRAS:+[$EXTRAS]}"
if [ -n "$COPY" ]; then
  "$VENV/bin/python" -m pip install --quiet "$package" ${CORE:+"$CORE"}
else
  "$VENV/bin/python" -m pip install --quiet --editable "$package" ${CORE:+"$CORE"}
fi
# megatron-core 0.19 imports triton and does not declare it; torch brings it where it is built for CUDA.
if "$VENV/bin/python" -c 'import megatron.core' 2>&1 | grep -q "No module named 'triton'"; then
  "$VENV/bin/python" -m pip install --quiet triton
fi
# The extension that calls the residual add's libraries needs torch, which pip's isolated build does not see.
"$VENV/bin/python" -m megatron_sbld.cxx
"$VENV/bin/python" 2>/dev/null - <<'EOF'
import megatron.core, torch
from megatron_sbld.residual.native import NAMES, library_path

built = ", ".join(name for name in NAMES if library_path(name).is_file()) or "none"
print(f"ready: torch {torch.__version__}, megatron-core {megatron.core.__version__}, residual libraries: {built}")
EOF
