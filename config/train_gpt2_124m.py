# A Llama of GPT-2 small's size (12 layers, 768 wide) on 10 B tokens of web text, on a node with 8 GPUs.
#   python prepare.py --source=hf:HuggingFaceFW/fineweb-edu:sample-10BT --tokenizer=gpt2 \
#       --out=data/fineweb_edu --val_fraction=0.001
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_124m.py
# On one GPU, leave torchrun out: the steps are the same. A smaller micro_batch_size saves memory.
dataset = "fineweb_edu"
out_dir = "out/gpt2_124m"

vocab_size = 50_257  # GPT-2's tokenizer
n_layer = 12
n_head = 12
n_embd = 768
intermediate_size = 2048
block_size = 1024

global_batch_size = 512  # x 1,024 = 0.5 M tokens per step, as GPT-3 has at this size
micro_batch_size = 32
max_steps = 19_000  # x 0.5 M = 10 B tokens
optimizer = "adamw"
lr_multipliers = {}
beta2 = 0.95
weight_decay = 0.1
learning_rate = 6e-4  # as GPT-3 has at this size
min_lr = 6e-5
schedule = "wsd"
warmup_steps = 700
eval_interval = 250
eval_tokens = 10 * 2**20
save_interval = 1000
