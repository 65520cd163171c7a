#!/usr/bin/env bash
# The whole pipeline on whatever machine this is: prepare the data, train the base model, let it write.
#   ./speedrun.sh          some minutes on two cores
#   ./speedrun.sh smoke    the same commands for a few steps
set -euo pipefail
cd "$(dirname "$0")"

out=out/base
flags=()
if [ "${1:-}" = smoke ]; then
    out=out/smoke
    flags=(--out_dir=$out --max_steps=10 --eval_tokens=4096 --overwrite=True)
fi
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
launch=(python)
while [ "$gpus" -gt 1 ] && [ $((16 % gpus)) -ne 0 ]; do gpus=$((gpus - 1)); done  # they share 16 sequences
if [ "$gpus" -gt 1 ]; then
    launch=(torchrun --standalone --nproc_per_node="$gpus")
    flags+=(--micro_batch_size=$((16 / gpus)))
fi

python prepare.py
"${launch[@]}" train.py "${flags[@]}"
python sample.py --model=$out --prompt="import os" --max_new_tokens=64
