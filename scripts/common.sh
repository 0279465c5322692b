# Sourced by the scripts beside it; docs/cluster.md documents the variables. Needs bash 4.4.
# shellcheck shell=bash

: "${SBLD_PYTHON:=python3}"                  # of the environment, or inside of the container
: "${SBLD_DEVICE:=gpu}"                      # gpu, or cpu to train without
: "${SBLD_LOG_DIR:=logs}"
export SBLD_PYTHON SBLD_DEVICE SBLD_LOG_DIR

die() {
  echo "error: $*" >&2
  if [ -n "${SBLD_STATUS_FILE:-}" ]; then echo 2 >"$SBLD_STATUS_FILE"; fi  # a mistake: nothing to try again
  exit 2
}

# help_if_asked SCRIPT ARGS...: print the comment at the head of a script and end, if that is asked for or nothing is given.
help_if_asked() {
  local text
  text=$(sed -n '2,/^[^#]/ { /^#SBATCH/d; s/^# \{0,1\}//p; }' "$1")
  case ${2:-} in
    -h | --help) echo "$text"; exit 0 ;;
    "") echo "$text" >&2; exit 2 ;;
  esac
}

need_file() {  # what it is, path
  [ -r "$2" ] || die "$1 $2 is not there or not readable (from $(pwd) on $HOSTNAME)"
}

print_command() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}

# What NCCL and CUDA are told; each can be set otherwise in the environment of whoever submits.
set_nccl_defaults() {
  # Megatron overlaps communication with computation in the order of its launches, which takes one hardware queue.
  : "${CUDA_DEVICE_MAX_CONNECTIONS:=1}"
  # Says which interfaces and transports were chosen only when something is wrong; INFO says it always.
  : "${NCCL_DEBUG:=WARN}"
  # How long an InfiniBand link may be silent: 4 us * 2^22 = 17 s for each of NCCL_IB_RETRY_CNT (7) retries. Links of
  # large fabrics that retrain or are routed anew take longer than the default of 2^18 or 2^20.
  : "${NCCL_IB_TIMEOUT:=22}"
  export CUDA_DEVICE_MAX_CONNECTIONS NCCL_DEBUG NCCL_IB_TIMEOUT
  # Not set, because the right value is the cluster's: NCCL_IB_HCA (adapters, mlx5_0,mlx5_1 say, where some lead to
  # storage alone), NCCL_SOCKET_IFNAME (interface for the first contact, ib0 or ^lo,docker0 say), NCCL_IB_GID_INDEX (RoCE).
}

# What the package imports.
modules=(megatron_sbld torch megatron.core numpy scipy jsonargparse docstring_parser yaml tokenizers tensorboard rich
  safetensors matplotlib)

need_package() {
  local missing
  command -v "$SBLD_PYTHON" >/dev/null || die "SBLD_PYTHON=$SBLD_PYTHON is not there on $HOSTNAME"
  missing=$("$SBLD_PYTHON" - "${modules[@]}" <<'EOF'
import importlib.util, sys

def found(name):
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of the package that it is in
        return None

print(*(name for name in sys.argv[1:] if not found(name)), sep=", ")
EOF
  ) || die "SBLD_PYTHON=$SBLD_PYTHON does not run on $HOSTNAME"
  [ -z "$missing" ] ||
    die "$SBLD_PYTHON on $HOSTNAME lacks $missing: install what is missing, or set SBLD_PYTHON, SBLD_SETUP or" \
      "SBLD_CONTAINER; see python -m megatron_sbld.doctor"
}

# Processes to start on this machine: SBLD_NPROC_PER_NODE, or one a GPU.
processes() {
  local gpus
  case $SBLD_DEVICE in
    cpu) echo "${SBLD_NPROC_PER_NODE:-1}" ;;
    gpu)
      gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true
      if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        gpus=$(awk -F, -v all="$gpus" '{ print NF < all ? NF : all }' <<<"$CUDA_VISIBLE_DEVICES")
      fi
      [ "$gpus" -gt 0 ] || die "no GPU on $HOSTNAME: nvidia-smi lists none; SBLD_DEVICE=cpu trains without"
      [ "${SBLD_NPROC_PER_NODE:-1}" -le "$gpus" ] ||
        die "SBLD_NPROC_PER_NODE=$SBLD_NPROC_PER_NODE, but $HOSTNAME has $gpus GPU(s) to use"
      echo "${SBLD_NPROC_PER_NODE:-$gpus}"
      ;;
    *) die "SBLD_DEVICE=$SBLD_DEVICE is not allowed: gpu or cpu" ;;
  esac
}

# on_this_machine NAME ARGS...: `megatron-sbld ARGS` on all of this machine's GPUs; what it prints is kept in a log as well.
on_this_machine() {
  local name=$1 count log
  shift
  need_package
  count=$(processes)  # its message is printed, and set -e ends the script
  set_nccl_defaults
  mkdir -p "$SBLD_LOG_DIR"
  log=$SBLD_LOG_DIR/$name-${HOSTNAME%%.*}-$(date +%Y%m%d-%H%M%S).log
  exec > >(trap '' INT TERM USR1 HUP; exec tee -a "$log") 2>&1  # tee becomes a child of the launcher, which signals those
  echo "log: $log"
  set -- "$SBLD_PYTHON" -m megatron_sbld.launch --standalone --nproc-per-node "$count" -m megatron_sbld "$@"
  print_command "$@"
  exec "$@"
}
