#!/usr/bin/env bash
# The whole pipeline on this machine: prepare, pre-train, distil, fine-tune, align, reinforce, evaluate, export.
#   ./speedrun.sh          24 minutes on two CPU cores; ends in tables of all models and exported files
#   ./speedrun.sh smoke    the same commands with 10 small training steps each, and two of the four exports
set -eo pipefail  # not -u: for the bash 3.2 of macOS an empty list would be an unset variable
cd "$(dirname "$0")"

out=out
exports=exports
batch=16  # sequences per step
kinds=(f16 q8_0 q4_k_m)  # of the exported GGUF files
train_flags=()
sft_flags=()
dpo_flags=()
grpo_flags=()
eval_flags=(--tasks=problems,hard_calculator --limit=100)
vote_flags=(--num_samples=8 --verifier=$out/verifier)
if [ "${1:-}" = smoke ]; then
    out=out/smoke
    exports=out/smoke/exports
    batch=4
    kinds=(q4_k_m)
    train_flags=(--max_steps=10 --global_batch_size=$batch --eval_tokens=4096 --overwrite=True)
    sft_flags=(--dataset=$out/chats)
    dpo_flags=(--dataset=$out/pairs)
    grpo_flags=(--group_size=2 --max_new_tokens=8 --eval_prompts=4)
    eval_flags=(--tasks=problems --limit=2)
    vote_flags=(--num_samples=2)
fi

# The GPUs share a batch, so use a number of GPUs that divides it.
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
while [ "$gpus" -gt 1 ] && [ $((batch % gpus)) -ne 0 ]; do gpus=$((gpus - 1)); done
launch=(python)
if [ "$gpus" -gt 1 ]; then
    launch=(torchrun --standalone --nproc_per_node="$gpus")
else
    gpus=1
fi
if [ $((batch / gpus)) -lt 16 ]; then
    train_flags+=(--micro_batch_size=$((batch / gpus)))
fi

# Text -> base model -> a smaller model taught by it.
python prepare.py
"${launch[@]}" train.py --out_dir=$out/base "${train_flags[@]}"
python sample.py --model=$out/base --prompt="def read(self" --max_new_tokens=64
"${launch[@]}" distill.py config/distill_tiny.py --teacher=$out/base --out_dir=$out/distilled \
    "${train_flags[@]}"

# Base model -> chat model -> chat model trained on preferences. Both stages make 40,000 problems as their data.
if [ "${1:-}" = smoke ]; then  # a few are enough
    for data in chat:chats preference:pairs; do
        python prepare.py --kind=${data%:*} --source=problems --tokenizer=$out/base --max_tokens=50000 \
            --out=$out/${data#*:} --overwrite=True
    done
fi
"${launch[@]}" sft.py --init_from=$out/base --out_dir=$out/sft "${sft_flags[@]}" "${train_flags[@]}"
"${launch[@]}" dpo.py --init_from=$out/sft --out_dir=$out/dpo "${dpo_flags[@]}" "${train_flags[@]}"

# Chat model -> right answers become likelier -> a verifier that scores answers.
"${launch[@]}" grpo.py --init_from=$out/dpo --out_dir=$out/grpo "${grpo_flags[@]}" "${train_flags[@]}"
if [ "${1:-}" = smoke ]; then
    echo "verifier.py is skipped: after 10 steps no answer is right, and a verifier needs right and wrong ones"
else
    "${launch[@]}" verifier.py --init_from=$out/grpo --out_dir=$out/verifier "${train_flags[@]}"
fi

# Every stage in one table: greedy, 8 samples, votes, and the verifier's choice.
python eval.py --model=$out/base --compare=$out/sft,$out/dpo,$out/grpo "${eval_flags[@]}" "${vote_flags[@]}"

# Export the last model. Evaluate every export, and the small model.
gguf=()
for kind in "${kinds[@]}"; do
    python export.py --model=$out/grpo --format=gguf --quantize=$kind --out=$exports/$kind --overwrite=True
    gguf+=("$exports/$kind")
done
python export.py --model=$out/grpo --out=$exports/hf --overwrite=True
compare=$(IFS=,; echo "${gguf[*]},$out/distilled")
python eval.py --model=$exports/hf --compare="$compare" "${eval_flags[@]}" --out_dir=$exports
