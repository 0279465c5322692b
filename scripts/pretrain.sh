#!/usr/bin/env bash
# Train on one machine, one process a GPU:
#
#   scripts/pretrain.sh CONFIG [--section.field VALUE ...]
#
# The same command again continues from the newest checkpoint. SIGTERM or SIGUSR1 saves and ends with status 75; other
# statuses: 0 complete, 76 a process was lost (start again), 2 a mistake in the config. Variables: docs/cluster.md.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=scripts/common.sh
source "$here/common.sh"
help_if_asked "$0" "$@"

config=$1
shift
need_file "config" "$config"
on_this_machine pretrain pretrain --config "$config" "$@"
