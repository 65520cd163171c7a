# GPT-2 small's own architecture: learned positions, LayerNorm, GELU, biases. The data is that of
# train_gpt2_124m.py. transformers loads the checkpoints as GPT2LMHeadModel.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_style_124m.py
dataset = "fineweb_edu"
out_dir = "out/gpt2_style_124m"

vocab_size = 50_257  # GPT-2's tokenizer
position = "learned"
norm = "layernorm"
mlp = "gelu"
bias = "all"
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

global_batch_size = 512  # x 1,024 = 0.5 M tokens per step
micro_batch_size = 32
max_steps = 19_000  # x 0.5 M = 10 B tokens
optimizer = "adamw"
lr_multipliers = {}
beta2 = 0.95
weight_decay = 0.1
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 700
schedule = "cosine"
eval_interval = 250
eval_tokens = 10 * 2**20
save_interval = 1000
