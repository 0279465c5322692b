#!/usr/bin/env bash
# Submit three jobs that follow each other: measure sensitivity, train with SBLD, score LAMBADA.
#
#   scripts/slurm/submit_chain.sh [options] CONFIG RUN_DIR PASSAGES [--section.field VALUE ...]
#
#   --parts N             tasks of the sensitivity sweep's job array (8)
#   --sensitivity FILE    measured before: do not measure again
#   --measure OPTIONS     options of `megatron-sbld sensitivity measure`, in one word: "--iterations 300 --seeds 1,2"
#   --measure-job, --pretrain-job, --evaluate-job OPTIONS
#                         options of sbatch for that job: "--nodes 8 --time 12:00:00"
#   --evaluate OPTIONS    options of `megatron-sbld evaluate lambada`: "--tensor_model_parallel_size 2"
#   --dry-run             print the commands alone
#
# Fields given behind PASSAGES are the training's and the sweep's. What holds for all jobs comes from the
# environment, as sbatch reads it: SBATCH_PARTITION, SBATCH_ACCOUNT. Prints the job ids. A job whose predecessor fails is
# cancelled. Variables: docs/cluster.md.
set -euo pipefail
home=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
# shellcheck source=scripts/common.sh
source "$home/scripts/common.sh"
help_if_asked "$0" "$@"

parts=8 sensitivity="" dry=""
measure=() measure_job=() pretrain_job=() evaluate_job=() evaluate=()
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1; shift; continue ;;
    --*) [ $# -ge 2 ] || die "$1 needs a value; see --help" ;;
    *) break ;;
  esac
  case $1 in
    --parts) parts=$2 ;;
    --sensitivity) sensitivity=$2 ;;
    --measure) read -ra measure <<<"$2" ;;
    --evaluate) read -ra evaluate <<<"$2" ;;
    --measure-job) read -ra measure_job <<<"$2" ;;
    --pretrain-job) read -ra pretrain_job <<<"$2" ;;
    --evaluate-job) read -ra evaluate_job <<<"$2" ;;
    *) die "$1 is not an option; see --help. Fields of the config come behind CONFIG RUN_DIR PASSAGES" ;;
  esac
  shift 2
done
[ $# -ge 3 ] || die "give a config, a run folder and a file of passages; see --help"
config=$1 run_dir=$2 passages=$3
shift 3
need_file "config" "$config"
need_file "file of passages" "$passages"
[[ $parts =~ ^[1-9][0-9]*$ ]] || die "--parts $parts is not allowed: a number of at least 1"
if [ -n "$sensitivity" ]; then need_file "sensitivity file" "$sensitivity"; fi
[ -n "$dry" ] || command -v sbatch >/dev/null || die "sbatch is not there: this is no login node of a Slurm cluster"
export SBLD_HOME=$home

# submit NAME ARGS...: sets `id`.
submit() {
  local name=$1
  shift
  set -- sbatch --parsable "$@"
  print_command "$@"
  if [ -n "$dry" ]; then
    id="<id of $name>"
    return
  fi
  id=$("$@") || die "sbatch refused the $name job"
  id=${id%%;*}  # of several clusters it says which
  echo "$name: job $id"
}

follow=()
if [ -z "$sensitivity" ]; then
  sensitivity=$run_dir/sensitivity/sensitivity.json
  submit sensitivity --array="1-$parts" "${measure_job[@]}" "$home/scripts/slurm/measure_sensitivity.sbatch" \
    "$config" "$run_dir/sensitivity" "$@" "${measure[@]}"
  follow=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
fi
submit pretrain "${follow[@]}" "${pretrain_job[@]}" "$home/scripts/slurm/pretrain.sbatch" \
  "$config" --logging.run_dir "$run_dir" --drop.policy sbld --drop.sensitivity "$sensitivity" "$@"
submit lambada --dependency="afterok:$id" --kill-on-invalid-dep=yes "${evaluate_job[@]}" \
  "$home/scripts/slurm/eval_lambada.sbatch" "$run_dir" "$passages" "${evaluate[@]}"
