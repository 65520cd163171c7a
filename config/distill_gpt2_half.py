# GPT-2 small with every second layer, like DistilGPT-2, on text with GPT-2's tokenizer.
#   python prepare.py --source=hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer=gpt2 --max_tokens=3e8 \
#       --out=data/fineweb
#   torchrun --standalone --nproc_per_node=8 distill.py config/distill_gpt2_half.py
out_dir = "out/distill_gpt2_half"
teacher = "gpt2"  # hub id; a folder works as well
student_layers = "every:2"
dataset = "fineweb"
block_size = 1024
global_batch_size = 256
micro_batch_size = 8
max_steps = 1200  # 256 x 1,024 x 1,200 = 315 M tokens
alpha = 0.5
temperature = 2.0
optimizer = "adamw"
learning_rate = 2.5e-4
lr_multipliers = {}
beta2 = 0.95
weight_decay = 0.1
schedule = "cosine"
eval_interval = 200
save_interval = 200
eval_tokens = 2**20
