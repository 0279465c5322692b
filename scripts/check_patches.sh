#!/usr/bin/env bash
# Checks a patch on a real Megatron-LM checkout; for maintainers, since no registry has Megatron-LM's training code.
#
#   MEGATRON_LM_DIR=/path/to/Megatron-LM scripts/check_patches.sh [PROCESSES [LAYOUT ARGUMENTS OF MEGATRON-LM ...]]
#
# On a copy of the checkout: prepares data with Megatron-LM's preprocess_data.py, trains unpatched, applies the patch,
# byte-compiles, trains with the flags absent (same losses, bit for bit), with layer dropping (saves, resumes, evaluates;
# same decisions as `draw_plan`), trains the same by pretrain_gpt_sbld.py, reverts, and compares with the original.
#
#   PYTHON        python with megatron-sbld and what Megatron-LM needs (default: .venv/bin/python, else python3)
#   DATA_DIR      gpt2-vocab.json, gpt2-merges.txt and a text wiki.valid.raw (default: ../shared/data)
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
MEGATRON_LM_DIR=$(realpath "${MEGATRON_LM_DIR:?set it to a Megatron-LM checkout}")
data=$(realpath "${DATA_DIR:-$repository/../shared/data}")
processes=${1:-1}
layout=("${@:2}")
python=$repository/.venv/bin/python
[[ -x $python ]] || python=python3
python=$(realpath -s "$(command -v "${PYTHON:-$python}")") || { echo "check_patches: there is no ${PYTHON:-$python}" >&2; exit 2; }
for needed in "$MEGATRON_LM_DIR/pretrain_gpt.py" "$data/gpt2-vocab.json" "$data/gpt2-merges.txt" "$data/wiki.valid.raw"; do
    [[ -f $needed ]] || { echo "check_patches: $needed is missing" >&2; exit 2; }
done

version=$(sed -nE 's/^(MAJOR|MINOR) = ([0-9]+).*/\2/p' "$MEGATRON_LM_DIR/megatron/core/package_info.py" | paste -sd.)
case $version in
    0.16) tag=core_v0.16.1 ;;
    0.19) tag=core_v0.19.0 ;;
    0.20) tag=main_d98e8a64 ;;
    *) echo "check_patches: there is no patch for core $version" >&2; exit 2 ;;
esac
patch=$repository/patches/megatron-lm/$tag/pretrain_gpt.patch

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
copy=$work/megatron-lm
mkdir "$copy"
tar -C "$MEGATRON_LM_DIR" --exclude=.git --exclude=__pycache__ -cf - . | tar -C "$copy" -xf -

export OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 HF_HUB_OFFLINE=1
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
runner=()
backend=nccl
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    runner=("$repository/tests/megatron_lm/on_cpu.py")
    backend=gloo
fi
compare=("$python" -W ignore "$repository/tests/megatron_lm/compare_runs.py")

say() { echo "check_patches: $*"; }

megatron() { # LOG SCRIPT ARGUMENTS: a single process
    "$python" -W ignore ${runner[@]+"${runner[@]}"} "${@:2}" >"$work/$1.log" 2>&1 || { tail -n 60 "$work/$1.log"; exit 1; }
}

train() { # NAME SCRIPT [ARGUMENTS]: as many processes as asked for; scalars go to $work/NAME
    "$python" -W ignore -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        ${runner[@]+"${runner[@]}"} "${@:2}" \
        --num-layers 6 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 \
        --micro-batch-size 2 --global-batch-size 8 --train-iters 6 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine \
        --lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 1.0 --hidden-dropout 0 --attention-dropout 0 \
        --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-bias-gelu-fusion \
        --no-bias-dropout-fusion --no-masked-softmax-fusion --attention-backend unfused \
        --distributed-backend "$backend" --data-path "$work/text_text_document" --data-cache-path "$work/cache" \
        --split 90,10,0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$work/gpt2" --num-workers 0 \
        --log-interval 1 --eval-interval 3 --eval-iters 1 --ckpt-format torch_dist \
        --tensorboard-dir "$work/$1" ${layout[@]+"${layout[@]}"} >"$work/$1.log" 2>&1 || { tail -n 60 "$work/$1.log"; exit 1; }
}

say "core $version, patch $tag, $processes process(es) ${layout[*]-} on $backend"
cd "$copy"

mkdir "$work/gpt2"
cp "$data/gpt2-vocab.json" "$work/gpt2/vocab.json"
cp "$data/gpt2-merges.txt" "$work/gpt2/merges.txt"
echo '{"model_type": "gpt2"}' >"$work/gpt2/config.json"
echo '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}' \
    >"$work/gpt2/tokenizer_config.json"
"$python" -c 'import json, sys
for line in open(sys.argv[1], encoding="utf-8"):
    if len(line) > 200: print(json.dumps({"text": line.strip()}))' "$data/wiki.valid.raw" >"$work/text.jsonl"
megatron preprocess tools/preprocess_data.py --input "$work/text.jsonl" --output-prefix "$work/text" \
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$work/gpt2" --append-eod --workers 1
say "preprocess_data.py: GPT-2 BPE, $(stat -c %s "$work/text_text_document.bin") bytes of tokens"

drop=(--sbld-policy sbld --sbld-sensitivity "$work/sensitivity.json" --sbld-theta 0.4 --sbld-peak-iteration 3
    --sbld-peak-theta 0.5 --sbld-beta 0.3 --sbld-theta-min 0.3 --sbld-allow-layers 2)
"${compare[@]}" sensitivity "$work/sensitivity.json"

train unpatched pretrain_gpt.py
git apply --check "$patch"
git apply "$patch"
"$python" -m compileall -q pretrain_gpt.py
say "applied with git apply; byte-compiles"
train absent pretrain_gpt.py
"${compare[@]}" same "$work/unpatched" "$work/absent"
train dropping pretrain_gpt.py "${drop[@]}" --save "$work/checkpoints" --save-interval 3
"${compare[@]}" decisions "$work/dropping" "$work/sensitivity.json"
echo 3 >"$work/checkpoints/latest_checkpointed_iteration.txt"
train resumed pretrain_gpt.py "${drop[@]}" --load "$work/checkpoints"
"${compare[@]}" same "$work/dropping" "$work/resumed"
git apply -R "$patch"
find . -name __pycache__ -prune -exec rm -rf {} +
diff -r --exclude=.git --exclude=__pycache__ --exclude='helpers_cpp*' "$MEGATRON_LM_DIR" .  # compiled on the first use
say "reverted: equals the original checkout"
train script "$repository/scripts/pretrain_gpt_sbld.py" "$copy" "${drop[@]}"
"${compare[@]}" same "$work/dropping" "$work/script"
say "all well"
