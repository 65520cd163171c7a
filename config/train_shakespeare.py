# Tinyshakespeare, nanoGPT's first example, with a small BPE trained on the plays. input.txt is its one file.
#   python prepare.py --source=input.txt --out=data/shakespeare --vocab_size=1024 --val_fraction=0.1
#   python train.py config/train_shakespeare.py
dataset = "shakespeare"
out_dir = "out/shakespeare"
vocab_size = 1024
dropout = 0.1  # 0.4 M tokens are read several times
