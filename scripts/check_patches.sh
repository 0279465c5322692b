#!/usr/bin/env bash
# Checks a patch on a real Megatron-LM checkout; for maintainers, since no registry has Megatron-LM's scripts. The training
# loop of 0.19's wheel is checked by tests/megatron_lm/test_training_loop.py.
#
#   MEGATRON_LM_DIR=/path/to/Megatron-LM scripts/check_patches.sh [PROCESSES [LAYOUT ARGUMENTS OF MEGATRON-LM ...]]
#
# On a copy of the checkout: prepares data with Megatron-LM's preprocess_data.py, applies the patch, byte-compiles, takes
# the steps, reverts, and compares with the original.
#
#   training      trains unpatched and with the flags absent (same losses, bit for bit), with layer dropping (saves,
#                 resumes, evaluates; same decisions as `draw_plan`), and the same by pretrain_gpt_sbld.py
#   checkpoints   continues what the unpatched, the patched and `megatron-sbld pretrain` saved with each other
#   350m          trains at GPT-3 350M's width with layer dropping: saves, resumes, evaluates
#
#   STEPS         those to take (default: all three)
#   LAYERS        of 350m (default: 24 on a GPU, else 4)
#   ITERATIONS    of 350m, even, at least 4 (default: 12 on a GPU, else 4)
#   PYTHON        python with megatron-sbld and what Megatron-LM needs (default: .venv/bin/python, else python3)
#   DATA_DIR      gpt2-vocab.json, gpt2-merges.txt and a text wiki.valid.raw (default: ../shared/data)
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
MEGATRON_LM_DIR=$(realpath "${MEGATRON_LM_DIR:?set it to a Megatron-LM checkout}")
data=$(realpath "${DATA_DIR:-$repository/../shared/data}")
processes=${1:-1}
layout=("${@:2}")
read -ra steps <<<"${STEPS:-training checkpoints 350m}"
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
trap 'status=$?; rm -rf "$work"; ((status == 0)) || echo "check_patches: FAILED" >&2' EXIT
copy=$work/megatron-lm
mkdir "$copy"
tar -C "$MEGATRON_LM_DIR" --exclude=.git --exclude=__pycache__ -cf - . | tar -C "$copy" -xf -

export OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 HF_HUB_OFFLINE=1
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
runner=()
backend=nccl
layers=${LAYERS:-24} iterations=${ITERATIONS:-12} batch=(--seq-length 2048 --micro-batch-size 2 --global-batch-size 8 --bf16)
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    runner=("$repository/tests/megatron_lm/on_cpu.py")
    backend=gloo
    layers=${LAYERS:-4} iterations=${ITERATIONS:-4} batch=(--seq-length 512 --micro-batch-size 1 --global-batch-size 2)
fi
# What `train` and `resume` take; 350m has its own.
size=(--num-layers 6 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128
    --micro-batch-size 2 --global-batch-size 8 --train-iters 6 --eval-interval 3 --lr 1e-3 --min-lr 1e-4)
half=3
drop=(--sbld-policy sbld --sbld-sensitivity "$work/sensitivity.json" --sbld-theta 0.4 --sbld-peak-iteration 3
    --sbld-peak-theta 0.5 --sbld-beta 0.3 --sbld-theta-min 0.3 --sbld-allow-layers 2)

say() { echo "check_patches: $*"; }

logged() { # LOG COMMAND: shown only where it fails
    "${@:2}" >"$work/$1.log" 2>&1 || { tail -n 60 "$work/$1.log"; exit 1; }
}

# Validation reads the text of the training: `megatron-sbld pretrain` has no --split, and only equality counts.
train() { # NAME SCRIPT [ARGUMENTS]: as many processes as asked for; scalars go to $work/NAME
    logged "$1" "$python" -W ignore -m torch.distributed.run --standalone --nproc-per-node "$processes" \
        ${runner[@]+"${runner[@]}"} "${@:2}" "${size[@]}" --lr-decay-style cosine \
        --lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 1.0 --hidden-dropout 0 --attention-dropout 0 \
        --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-bias-gelu-fusion \
        --no-bias-dropout-fusion --no-masked-softmax-fusion --attention-backend unfused \
        --distributed-backend "$backend" --train-data-path "$work/text_text_document" \
        --valid-data-path "$work/text_text_document" --data-cache-path "$work/cache" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$work/gpt2" --num-workers 0 \
        --log-interval 1 --eval-iters 1 --ckpt-format torch_dist --save-interval "$half" \
        --tensorboard-dir "$work/$1" ${layout[@]+"${layout[@]}"}
}

resume() { # NAME FOLDER SCRIPT [ARGUMENTS]: from what was saved half way
    train "$1" "$3" --load "$work/$2" --ckpt-step "$half" "${@:4}"
}

sbld() { # LOG COMMAND: in one process, from a folder in which Python does not take the checkout for megatron-core
    cd "$work"
    logged "$1" "$python" -W ignore -m megatron_sbld "${@:2}"
    cd "$copy"
}

check() { # WHAT COMMAND: of compare_runs.py, on names of runs
    local found
    found=$(cd "$work" && "$python" -W ignore "$repository/tests/megatron_lm/compare_runs.py" "${@:2}") ||
        { echo "check_patches: $1: does not hold" >&2; exit 1; }
    say "$1: $found"
}

from_scratch() { # once: the runs with which two steps begin
    [[ ! -d $work/dropping ]] || return 0
    train unpatched unpatched_gpt.py --save "$work/unpatched.saved"
    train absent pretrain_gpt.py --save "$work/absent.saved"
    check "patched, flags absent" same unpatched absent
    check "sensitivity" sensitivity sensitivity.json
    train dropping pretrain_gpt.py "${drop[@]}" --save "$work/dropping.saved"
    check "SBLD" decisions dropping sensitivity.json
}

step_training() {
    from_scratch
    resume resumed dropping.saved pretrain_gpt.py "${drop[@]}"
    check "SBLD, resumed" same dropping resumed --first 4
    check "SBLD, resumed" decisions resumed sensitivity.json --first 4
}

step_checkpoints() {
    local tensor_ranks=1 other_layout=() saved
    [[ ! " ${layout[*]-} " =~ " --tensor-model-parallel-size "([0-9]+) ]] || tensor_ranks=${BASH_REMATCH[1]}
    ((processes == 1)) || other_layout=(--other-layout) # than that of `megatron-sbld pretrain`: one process
    from_scratch
    resume unpatched_from_absent absent.saved unpatched_gpt.py
    check "unpatched, from flags absent" same unpatched unpatched_from_absent --first 4
    resume absent_from_unpatched unpatched.saved pretrain_gpt.py
    check "flags absent, from unpatched" same unpatched absent_from_unpatched --first 4
    # A policy that keeps every layer: what is continued with the flags can be compared, too.
    resume kept_from_unpatched unpatched.saved pretrain_gpt.py --sbld-policy layerdrop --sbld-theta 1
    check "LayerDrop at theta 1, from unpatched" same unpatched kept_from_unpatched --first 4
    resume absent_from_dropping dropping.saved pretrain_gpt.py
    resume unpatched_from_dropping dropping.saved unpatched_gpt.py
    check "unpatched and flags absent, from SBLD" same absent_from_dropping unpatched_from_dropping --first 4

    # Each tensor-parallel rank's part of the vocabulary is padded, and the padding takes part in the loss.
    cat >"$work/gpt.yaml" <<EOF
model: {num_layers: 6, hidden_size: 64, num_attention_heads: 4, seq_length: 128, hidden_dropout: 0.0, attention_dropout: 0.0,
  transformer_impl: local, make_vocab_size_divisible_by: $((128 * tensor_ranks))}
data: {tokenizer: $work/gpt2, train_data_path: [$work/text_text_document]}
optimizer: {lr: 1.0e-3, min_lr: 1.0e-4, lr_warmup_iters: 2, adam_beta2: 0.999}
training: {micro_batch_size: 2, global_batch_size: 8, train_iters: 6, precision: fp32}
drop: {policy: sbld, sensitivity: $work/sensitivity.json, theta: 0.4, peak_iteration: 3, peak_theta: 0.5, beta: 0.3,
  theta_min: 0.3, allow_layers: [2]}
checkpoint: {save_interval: $half}
EOF
    sbld pretrain pretrain --config gpt.yaml --logging.run_dir pretrained
    resume dropping_from_pretrained pretrained/checkpoints pretrain_gpt.py "${drop[@]}" --save "$work/continued.saved"
    check "SBLD, from megatron-sbld pretrain" \
        near pretrained dropping_from_pretrained --first 4 ${other_layout[@]+"${other_layout[@]}"}
    check "its decisions" decisions dropping_from_pretrained sensitivity.json --first 4
    resume unpatched_from_pretrained pretrained/checkpoints unpatched_gpt.py
    if ((processes == 1)); then # else Megatron-LM may draw other initial weights
        check "megatron-sbld pretrain, the same run" near dropping pretrained
        check "unpatched, from megatron-sbld pretrain" near unpatched_from_dropping unpatched_from_pretrained --first 4
    fi
    local tune=(sbld tuned pretrain --config gpt.yaml --logging.run_dir tuned --checkpoint.load "dropping.saved/iter_0000003")
    "${tune[@]}"
    resume finetuned dropping.saved pretrain_gpt.py "${drop[@]}" --finetune
    check "megatron-sbld pretrain, from SBLD's weights" near finetuned tuned ${other_layout[@]+"${other_layout[@]}"}
    for saved in pretrained/checkpoints/iter_0000006 continued.saved/iter_0000006 "pretrained/checkpoints/iter_000000$half"; do
        sbld evaluate evaluate perplexity --config gpt.yaml --checkpoint "$saved" --data text.jsonl --limit 20 --out "$saved.evaluated"
    done
    check "megatron-sbld evaluate, both programs' last checkpoints" perplexity {pretrained/checkpoints,continued.saved}/iter_0000006.evaluated \
        "pretrained/checkpoints/iter_000000$half.evaluated"
}

step_350m() {
    local half=$((iterations / 2))
    local size=(--num-layers "$layers" --hidden-size 1024 --num-attention-heads 16 --max-position-embeddings 2048
        "${batch[@]}" --train-iters "$iterations" --eval-interval "$half" --lr 3e-4 --min-lr 3e-5)
    local drop=("${drop[@]}" --sbld-sensitivity "$work/wide.json")
    check "sensitivity" sensitivity wide.json --layers "$layers"
    train wide pretrain_gpt.py "${drop[@]}" --save "$work/wide.saved"
    check "350M's width, $layers layers, SBLD" decisions wide wide.json --layers "$layers" --iterations "$iterations"
    resume wide_resumed wide.saved pretrain_gpt.py "${drop[@]}"
    check "350M's width, resumed" same wide wide_resumed --iterations "$iterations" --first $((half + 1))
    check "350M's width, resumed" decisions wide_resumed wide.json --layers "$layers" --iterations "$iterations" --first $((half + 1))
}

((${#steps[@]})) || { echo "check_patches: STEPS names no step" >&2; exit 2; }
for step in "${steps[@]}"; do
    declare -F "step_$step" >/dev/null ||
        { echo "check_patches: STEPS names $step; there are training, checkpoints, 350m" >&2; exit 2; }
done
((iterations >= 4 && iterations % 2 == 0)) || { echo "check_patches: ITERATIONS is $iterations: must be even, at least 4" >&2; exit 2; }

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
logged preprocess "$python" -W ignore ${runner[@]+"${runner[@]}"} tools/preprocess_data.py --input "$work/text.jsonl" \
    --output-prefix "$work/text" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$work/gpt2" --append-eod --workers 1
say "preprocess_data.py: GPT-2 BPE, $(stat -c %s "$work/text_text_document.bin") bytes of tokens"

cp pretrain_gpt.py unpatched_gpt.py
git apply --check "$patch"
git apply "$patch"
"$python" -m compileall -q pretrain_gpt.py
say "applied with git apply; byte-compiles"
for step in "${steps[@]}"; do
    "step_$step"
done
git apply -R "$patch"
rm unpatched_gpt.py
find . -name __pycache__ -prune -exec rm -rf {} +
# Megatron-LM 0.16 itself makes this folder when it starts on a GPU, for kernels that it no longer builds: it stays empty.
made_on_gpu=megatron/legacy/fused_kernels/build
[[ ! -d $made_on_gpu || -d $MEGATRON_LM_DIR/$made_on_gpu ]] || rmdir "$made_on_gpu"
diff -r --exclude=.git --exclude=__pycache__ --exclude='helpers_cpp*' "$MEGATRON_LM_DIR" .  # compiled on the first use
say "reverted: equals the original checkout"
if [[ " ${steps[*]} " == *" training "* ]]; then
    train script "$repository/scripts/pretrain_gpt_sbld.py" "$copy" "${drop[@]}"
    check "SBLD, by pretrain_gpt_sbld.py" same dropping script
fi
say "all well"
