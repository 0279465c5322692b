#!/usr/bin/env bash
# Trains GPT-3 350M in a Megatron-LM checkout with staged depth: 6 layers until 60 % of the iterations, then all 24.
#
#   examples/megatron_lm.sh CHECKOUT DATA_PREFIX TOKENIZER_FOLDER [MORE ARGUMENTS]
#
# DATA_PREFIX: what `megatron-sbld prepare` or preprocess_data.py wrote, without .bin. TOKENIZER_FOLDER: vocab.json and merges.txt.
# Needs a GPU. The checkout needs no patch: scripts/pretrain_gpt_sbld.py adds the --sbld-* arguments.
set -euo pipefail
if [ $# -lt 3 ] || [ "$1" = --help ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  [ "${1:-}" = --help ] && exit 0 || exit 2
fi
checkout=$1 data=$2 tokenizer=$3
shift 3
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec torchrun --nproc-per-node "${GPUS:-1}" "$(dirname "$0")/../scripts/pretrain_gpt_sbld.py" "$checkout" \
  --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 2048 --max-position-embeddings 2048 \
  --micro-batch-size 8 --global-batch-size 256 --train-iters 10000 --lr 3e-4 --min-lr 3e-5 --lr-warmup-iters 500 --bf16 \
  --data-path "$data" --tokenizer-type GPT2BPETokenizer --vocab-file "$tokenizer/vocab.json" --merge-file "$tokenizer/merges.txt" \
  --sbld-policy staged --sbld-stages "[[0.6, 6], [1.0, 24]]" "$@"
