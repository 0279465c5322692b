#!/usr/bin/env bash
# What a job starts on each of its nodes, in the container if there is one: torchrun for `megatron-sbld ARGS`.
#
#   node.sh FOLDER ARGS...     FOLDER gets the node's exit status
#   node.sh --alone ARGS...    one process, without torchrun
set -euo pipefail
trap '' USR1  # until the launcher takes it: the default would end the step
# shellcheck source=scripts/common.sh
source "${SBLD_HOME:?}/scripts/common.sh"
if [ "${1:-}" != --alone ]; then
  export SBLD_STATUS_FILE=${1:?}/node_${SLURM_NODEID:?}.status
fi
shift
if [ -n "${SBLD_SETUP:-}" ]; then
  set +eu  # such files are not written for it
  # shellcheck disable=SC1090
  source "$SBLD_SETUP" || die "SBLD_SETUP=$SBLD_SETUP failed on $HOSTNAME"
  set -eu
fi
need_package
echo "$(date '+%F %T') $HOSTNAME as node $SLURM_NODEID of ${SLURM_NNODES:?}"
if [ -z "${SBLD_STATUS_FILE:-}" ]; then
  set -- "$SBLD_PYTHON" -m megatron_sbld "$@"
else
  count=$(processes) || exit
  set -- "$SBLD_PYTHON" -m megatron_sbld.launch --nnodes "$SLURM_NNODES" --nproc-per-node "$count" \
    --rdzv-backend c10d --rdzv-endpoint "$SBLD_RDZV_HOST:$SBLD_RDZV_PORT" \
    --rdzv-id "${SLURM_JOB_ID:?}.${SLURM_RESTART_COUNT:-0}" -m megatron_sbld "$@"
fi
print_command "$@"
exec "$@"
