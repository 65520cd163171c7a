# Tiny Shakespeare, the first example of nanoGPT, with a small BPE trained on it. input.txt is its only file:
#   curl -O https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
#   python prepare.py --source=input.txt --out=data/shakespeare --vocab_size=1024 --val_fraction=0.1
#   python train.py config/train_shakespeare.py
dataset = "shakespeare"
out_dir = "out/shakespeare"
vocab_size = 1024
dropout = 0.1  # the data has only 0.4 M tokens and is read several times
