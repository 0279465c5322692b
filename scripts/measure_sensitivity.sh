#!/usr/bin/env bash
# Measure the sensitivity of a config's layers on one machine, one process a GPU; the result is OUT/sensitivity.json:
#
#   scripts/measure_sensitivity.sh CONFIG OUT [options of `megatron-sbld sensitivity measure`] [--section.field VALUE ...]
#
# The same command again goes on with the first run that is missing. Variables: docs/cluster.md.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=scripts/common.sh
source "$here/common.sh"
help_if_asked "$0" "$@"

[ $# -ge 2 ] || die "give a config and a folder for the result; see --help"
config=$1 out=$2
shift 2
need_file "config" "$config"
on_this_machine sensitivity sensitivity measure --config "$config" --out "$out" "$@"
