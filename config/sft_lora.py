# A LoRA adapter for an open model, from your own chats. Needs one GPU with 24 GB, or patience on a CPU.
#   python prepare.py --kind=chat --source=chats.jsonl --tokenizer=Qwen/Qwen3-0.6B --out=data/chats
#   python sft.py config/sft_lora.py --dataset=chats --merge=True
out_dir = "out/sft_lora"
init_from = "Qwen/Qwen3-0.6B"  # a folder or a hub id
dataset = "chats"
block_size = 2048
lora_rank = 16
lora_alpha = 32.0
optimizer = "adamw"
learning_rate = 2e-4
beta2 = 0.999
weight_decay = 0.0
schedule = "cosine"
global_batch_size = 16
micro_batch_size = 2
stages = [dict(epochs=2)]
activation_checkpointing = True
