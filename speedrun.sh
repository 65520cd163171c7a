#!/usr/bin/env bash
# The whole pipeline on this machine: prepare, pre-train, distil, fine-tune, align, export, evaluate.
#   ./speedrun.sh          15 minutes on two CPU cores; ends in a table of all models and exported files
#   ./speedrun.sh smoke    the same commands with 10 training steps each
set -euo pipefail
cd "$(dirname "$0")"

out=out
exports=exports
train_flags=()
eval_flags=(--tasks=problems,hard_calculator --limit=100)
if [ "${1:-}" = smoke ]; then
    out=out/smoke
    exports=out/smoke/exports
    train_flags=(--max_steps=10 --eval_tokens=4096 --overwrite=True)
    eval_flags=(--tasks=problems --limit=4)
fi

# The GPUs share a batch of 16 sequences, so use a number of GPUs that divides 16.
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
while [ "$gpus" -gt 1 ] && [ $((16 % gpus)) -ne 0 ]; do gpus=$((gpus - 1)); done
launch=(python)
if [ "$gpus" -gt 1 ]; then
    launch=(torchrun --standalone --nproc_per_node="$gpus")
    train_flags+=(--micro_batch_size=$((16 / gpus)))
fi

# Text -> base model -> a smaller model taught by it.
python prepare.py
"${launch[@]}" train.py --out_dir=$out/base "${train_flags[@]}"
python sample.py --model=$out/base --prompt="import os" --max_new_tokens=64
"${launch[@]}" distill.py config/distill_tiny.py --teacher=$out/base --out_dir=$out/distilled \
    "${train_flags[@]}"

# Base model -> chat model -> chat model trained on preferences.
"${launch[@]}" sft.py --init_from=$out/base --out_dir=$out/sft "${train_flags[@]}"
"${launch[@]}" dpo.py --init_from=$out/sft --out_dir=$out/dpo "${train_flags[@]}"

# Export the last model in four formats, then evaluate every model and every export in one table.
gguf=()
for kind in f16 q8_0 q4_k_m; do
    python export.py --model=$out/dpo --format=gguf --quantize=$kind --out=$exports/$kind --overwrite=True
    gguf+=("$exports/$kind")
done
python export.py --model=$out/dpo --out=$exports/hf --overwrite=True
compare=$(IFS=,; echo "$out/distilled,$out/sft,$out/dpo,$exports/hf,${gguf[*]}")
python eval.py --model=$out/base --compare="$compare" "${eval_flags[@]}"
