# Sourced by the jobs beside it: run a command on all nodes of the job; go on after preemption and lost nodes.
# shellcheck shell=bash

: "${SBLD_MAX_FAILURES:=3}"       # attempts in a row that fail soon, before the job gives up
: "${SBLD_PROGRESS_SECONDS:=1800}" # an attempt that lasted longer has got somewhere: save more often than that

# Check what can be checked before nodes are put to work, and name the job's log folder.
prepare_job() {
  # Of an array's task: one of them has the array's own number as its SLURM_JOB_ID, which to Slurm means all of them.
  job_id=${SLURM_JOB_ID:?}
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job_id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  case $SBLD_LOG_DIR in /*) ;; *) SBLD_LOG_DIR=$PWD/$SBLD_LOG_DIR ;; esac
  job_logs=$SBLD_LOG_DIR/${SLURM_JOB_NAME:-job}-$job_id
  attempt_logs=$job_logs/attempt_${SLURM_RESTART_COUNT:-0}
  mkdir -p "$attempt_logs"
  if [ -n "${SBLD_SETUP:-}" ]; then need_file SBLD_SETUP "$SBLD_SETUP"; fi
  set_nccl_defaults
  # The first node's address for the rendezvous. A port that follows from the job, for jobs that share a node.
  if [ -z "${SBLD_RDZV_HOST:-}" ]; then
    SBLD_RDZV_HOST=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
  fi
  : "${SBLD_RDZV_PORT:=$((20000 + SLURM_JOB_ID % 10000))}"
  export SBLD_HOME SBLD_RDZV_HOST SBLD_RDZV_PORT
  in_container
  echo "job $job_id, attempt ${SLURM_RESTART_COUNT:-0}, nodes ${SLURM_JOB_NODELIST:?}, logs in $attempt_logs"
}

# Set `container`, what comes between srun and the command, and `container_options`, what srun itself is given.
in_container() {
  container=() container_options=()
  [ -n "${SBLD_CONTAINER:-}" ] || return 0
  local mounts=$SBLD_HOME:$SBLD_HOME,$PWD:$PWD,$job_logs:$job_logs setup
  if [ -n "${SBLD_SETUP:-}" ]; then
    setup=$(dirname "$(realpath "$SBLD_SETUP")")
    mounts+=,$setup:$setup
  fi
  mounts+=${SBLD_CONTAINER_MOUNTS:+,$SBLD_CONTAINER_MOUNTS}
  local runtime=${SBLD_CONTAINER_RUNTIME:-} image=$SBLD_CONTAINER
  case $image in
    /* | ./* | ../* | *.sif | *.sqsh)
      need_file SBLD_CONTAINER "$image"
      image=$(realpath "$image")  # to pyxis a name that begins otherwise is a registry's
      ;;
  esac
  if [ -z "$runtime" ]; then
    if [[ $image = *.sif || ( $image = /* && -d $image ) ]]; then runtime=apptainer; else runtime=pyxis; fi
  fi
  case $runtime in
    pyxis)
      srun --help | grep -q -- --container-image ||
        die "SBLD_CONTAINER=$SBLD_CONTAINER needs pyxis, which this Slurm does not have; SBLD_CONTAINER_RUNTIME=apptainer?"
      container_options=(--container-image="$image" --container-mounts="$mounts" --container-workdir="$PWD")
      ;;
    apptainer)
      command -v apptainer >/dev/null || die "SBLD_CONTAINER=$SBLD_CONTAINER needs apptainer, which is not on the path of $HOSTNAME"
      local gpus=()
      if [ "$SBLD_DEVICE" = gpu ]; then gpus=(--nv); fi
      # Without it the image is mounted by a process of the step: Slurm's signals end that too, and the run, which is to
      # save, loses its files.
      export APPTAINER_UNSQUASH=${APPTAINER_UNSQUASH:-true}
      container=(apptainer exec "${gpus[@]}" --bind "$mounts" --pwd "$PWD" "$image")
      ;;
    *) die "SBLD_CONTAINER_RUNTIME=$runtime is not allowed: pyxis or apptainer" ;;
  esac
}

# on_all_nodes ARGS...: `megatron-sbld ARGS` under torchrun on every node. Returns when it is complete; otherwise the job ends.
on_all_nodes() {
  local began=$SECONDS
  rm -f "$attempt_logs"/*.status
  # One task a node has all of its cores, and may end later than others: to write its part of the last checkpoint.
  run_step --nodes="${SLURM_NNODES:?}" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=0 \
    --output="$attempt_logs/node_%n.log" --error="$attempt_logs/node_%n.log" "${container_options[@]}" \
    "${container[@]}" bash "$SBLD_HOME/scripts/slurm/node.sh" "$attempt_logs" "$@"
  if [ "$step_status" = 0 ]; then
    rm -f "$job_logs/failures"
    return 0
  fi
  end_or_requeue "$(status_of_nodes)" $((SECONDS - began))
}

# on_one_node ARGS...: `megatron-sbld ARGS` as one process on the first node.
on_one_node() {
  run_step --nodes=1 --ntasks=1 "${container_options[@]}" "${container[@]}" \
    bash "$SBLD_HOME/scripts/slurm/node.sh" --alone "$@"
  [ "$step_status" = 0 ] || exit "$step_status"
}

# Run srun with these arguments and pass a request to stop on to the step; sets step_status. Slurm sends USR1 to this
# shell alone (--signal=B:USR1@...), and SIGTERM of preemption to the step.
run_step() {
  local step
  print_command srun "$@"
  srun "$@" &
  step=$!
  # shellcheck disable=SC2064  # the process of now
  trap "echo 'asked to stop; passed on to the step'; kill -USR1 $step 2>/dev/null || true" USR1 TERM
  while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done  # it returns whenever a signal was handled
  wait "$step" && step_status=0 || step_status=$?
  trap : USR1 TERM
}

# The step's status from what the nodes have left (see megatron_sbld/launch.py); a node that left nothing was lost.
status_of_nodes() {
  local statuses status
  statuses=$(sort -nu "$attempt_logs"/*.status 2>/dev/null) || true
  for status in 2 $statuses; do  # a mistake first, then a failure of a worker's own, then 75, then 76
    if [ "$status" != 0 ] && grep -qx "$status" <<<"$statuses"; then
      echo "$status"
      return
    fi
  done
  echo 76
}

# show_why STATUS: what the nodes' logs say of it, so that the job's own log suffices.
show_why() {
  if [ "$1" = 75 ]; then
    grep -hs 'stopped on request' "$attempt_logs"/node_*.log || true
  elif grep -qs 'megatron-sbld: error\|^error:' "$attempt_logs"/node_*.log; then
    grep -hs -A 5 'megatron-sbld: error\|^error:' "$attempt_logs"/node_*.log | sed -n '1,20p'
  else
    tail -n 20 "$attempt_logs/node_0.log" || true
  fi
}

# end_or_requeue STATUS SECONDS: of an attempt that is not complete.
end_or_requeue() {
  local status=$1 lasted=$2 failures=0 state
  show_why "$status"
  if [ "$status" != 75 ]; then
    if [ "$lasted" -lt "$SBLD_PROGRESS_SECONDS" ] && [ -f "$job_logs/failures" ]; then
      failures=$(<"$job_logs/failures")
    fi
    failures=$((failures + 1))
    echo "$failures" >"$job_logs/failures"
  else
    rm -f "$job_logs/failures"
  fi
  state=$(squeue --noheader --jobs "$job_id" --format %T) || state=unknown
  if [ "$status" = 2 ]; then
    echo "status 2: a mistake, named above and in $attempt_logs; not requeued"
  elif [ "$state" != RUNNING ]; then
    echo "status $status: the job is $state, so it is left to end"
  elif [ "$status" -lt 75 ] && [ "$lasted" -lt "$SBLD_PROGRESS_SECONDS" ]; then
    echo "status $status after $lasted s: an error that would come again, see $attempt_logs; not requeued"
  elif [ "$failures" -ge "$SBLD_MAX_FAILURES" ]; then
    echo "status $status: failed $failures times in a row without getting far; not requeued"
  else
    echo "status $status after $lasted s: requeued, to go on from the last checkpoint"
    trap '' TERM  # from Slurm, at once, for this shell and for scontrol
    scontrol requeue "$job_id" || echo "Slurm did not requeue the job (--no-requeue?); submit it again to go on"
  fi
  exit "$status"
}
