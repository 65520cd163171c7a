# The 1.1 B Llama: 22 layers, 2048 wide, 32 query and 4 key/value heads, contexts of 4096, 30 B tokens.
#   python prepare.py --source=hf:HuggingFaceFW/fineweb-edu:sample-100BT --vocab_size=32000 \
#       --out=data/nanollama --val_fraction=0.0005 --max_tokens=30e9
#   torchrun --standalone --nproc_per_node=8 train.py config/train_nanollama_1b.py
dataset = "nanollama"
out_dir = "out/nanollama_1b"

vocab_size = 32_000
n_layer = 22
n_head = 32
n_kv_head = 4
n_embd = 2048
intermediate_size = 5632
block_size = 4096
tie_embeddings = False

parallel = "fsdp"
global_batch_size = 32  # x 4096 = 131,072 tokens
micro_batch_size = 4
max_steps = 230_000  # x 131,072 = 30 B tokens
optimizer = "adamw"
lr_multipliers = {}
beta2 = 0.95
weight_decay = 0.1
learning_rate = 4e-4  # TinyLlama's
min_lr = 4e-5
schedule = "wsd"
warmup_steps = 2000
decay_steps = 23_000  # the last tenth
z_loss = 1e-4
eval_interval = 1000
eval_tokens = 10 * 2**20
save_interval = 1000
keep_checkpoints = 3
