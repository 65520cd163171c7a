# Preference optimisation after config/sft_lora.py. The reference is the same model with its adapter off.
#   python prepare.py --kind=preference --source=pairs.jsonl --tokenizer=out/sft_lora/merged --out=data/pairs
#   python dpo.py config/dpo_lora.py --dataset=pairs --merge=True
out_dir = "out/dpo_lora"
init_from = "out/sft_lora/merged"
dataset = "pairs"
block_size = 2048
lora_rank = 16
lora_alpha = 32.0
reference = "adapter_off"
learning_rate = 2e-5
nll_weight = 0.0  # plain DPO
beta2 = 0.999
global_batch_size = 32  # pairs
micro_batch_size = 1
stages = [dict(epochs=1)]
activation_checkpointing = True
