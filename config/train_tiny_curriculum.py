# The four stages of train_nanollama_1b.py in small: 2.0 M tokens, 8 minutes on two cores at 4,400 tokens/s.
# Uses data/books and data/docs (long documents, one tokenizer) if both exist, else the embedded corpus:
#   python prepare.py --source=novels.jsonl.xz --out=data/books        (about a hundred whole books)
#   python prepare.py --source=docs.jsonl.xz --tokenizer=data/books --out=data/docs   (pages with code)
#   python train.py config/train_tiny_curriculum.py
# Does the model use the longer context? Loss by position and by context, before and after the long stage:
#   python eval.py --tasks=context_length --data=context_length=data/books --context_length=512 \
#       --model=out/tiny_curriculum/step_000600 --compare=out/tiny_curriculum/step_000800
# Every evaluation reads the last stage's text in rows of 128, so the results of all stages can be compared.
import os

_both_exist = os.path.isdir("data/books") and os.path.isdir("data/docs")
_books, _both, _gold = ("books", "books:0.5,docs:0.5", "docs") if _both_exist else ("pystdlib",) * 3

dataset = _books
out_dir = "out/tiny_curriculum"
schedule = "wsd"  # one schedule for the whole run
decay_steps = 200  # all of the last stage
learning_rate = 4e-3
stages = [  # 2,048 tokens per step in every stage
    dict(steps=500),  # rows of 128
    dict(steps=100, block_size=256, global_batch_size=8, micro_batch_size=8, rope_theta=(10_000, 500_000),
         document_mask=True),
    dict(steps=200, block_size=512, global_batch_size=4, micro_batch_size=4, rope_theta=500_000,
         document_mask=True, dataset=_both),
    dict(steps=200, rope_theta=500_000, dataset=_gold),  # rows of 128 again
]
eval_tokens = 2**16
eval_interval = 0  # only at the end of each stage, which also has a checkpoint
save_interval = 0
