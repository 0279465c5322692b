#!/usr/bin/env bash
# Score LAMBADA with a trained model on one machine, one process a GPU; results are kept in the run folder:
#
#   scripts/eval_lambada.sh CHECKPOINT PASSAGES [options of `megatron-sbld evaluate lambada`]
#
# CHECKPOINT is a run folder, or one of its checkpoints; PASSAGES is plain text, a passage a line, or JSON lines.
# --every_checkpoint scores all that the run has kept. Variables: docs/cluster.md.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=scripts/common.sh
source "$here/common.sh"
help_if_asked "$0" "$@"

[ $# -ge 2 ] || die "give a checkpoint and a file of passages; see --help"
checkpoint=$1 passages=$2
shift 2
need_file "checkpoint" "$checkpoint"
need_file "file of passages" "$passages"
on_this_machine lambada evaluate lambada --checkpoint "$checkpoint" --data "$passages" "$@"
