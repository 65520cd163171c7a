# Tinyshakespeare, as in nanoGPT's README: the plays in one file, GPT-2's ids replaced by a small BPE trained on them.
#   python prepare.py --source=input.txt --out=data/shakespeare --vocab_size=1024 --val_fraction=0.1
#   python train.py config/train_shakespeare.py
dataset = "shakespeare"
out_dir = "out/shakespeare"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
dropout = 0.1  # 0.3 M tokens are soon known by heart

max_steps = 1000
learning_rate = 4e-3
eval_interval = 250
