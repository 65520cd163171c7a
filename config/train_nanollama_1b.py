# A 1.1 B Llama: 22 layers, 2048 wide, 32 query heads, 4 key/value heads. 30 B tokens, context up to 16 K.
# Data, all with the web text's tokenizer. Replace books/, code/, qa/ and stem/ by your own files or hub sets:
#   python prepare.py --source=hf:HuggingFaceFW/fineweb-edu:sample-100BT --vocab_size=32000 \
#       --out=data/web --val_fraction=0.0005 --max_tokens=26e9
#   python prepare.py --source=books/ --tokenizer=data/web --out=data/books --max_tokens=1e9
#   python prepare.py --source=code/ --tokenizer=data/web --out=data/code --max_tokens=1e9
#   python prepare.py --source=hf:HuggingFaceTB/finemath:finemath-4plus --tokenizer=data/web \
#       --out=data/maths --max_tokens=1.3e9
#   python prepare.py --source=qa/ --tokenizer=data/web --out=data/qa --max_tokens=1e9
#   python prepare.py --source=stem/ --tokenizer=data/web --out=data/stem --max_tokens=1e9
# On a node with 8 GPUs. More do not help: a step of the 16 K stage has 8 rows.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_nanollama_1b.py
# Every evaluation reads the last stage's text in rows of 4 K, so the results of all stages can be compared.
dataset = "web"
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
global_batch_size = 32  # x 4,096 = 131,072 tokens per step, in every stage; 30.1 B in all
micro_batch_size = 4
optimizer = "adamw"
lr_multipliers = {}
beta2 = 0.95
weight_decay = 0.1
learning_rate = 4e-4  # as TinyLlama
min_lr = 4e-5
schedule = "wsd"  # one schedule for the whole run
warmup_steps = 2000
decay_steps = 23_000  # the last tenth of the run, which is stage 4
z_loss = 1e-4
stages = [
    # 4 K to step 184,000: 32 x 4,096 = 131,072 tokens per step, 24.1 B in all.
    dict(steps=184_000),
    # 8 K to step 194,000: 16 x 8,192 = 131,072 tokens per step, 1.3 B. The rotary base rises geometrically.
    dict(steps=10_000, block_size=8192, global_batch_size=16, micro_batch_size=2,
         rope_theta=(10_000, 500_000), document_mask=True),
    # 16 K to step 207,000: 8 x 16,384 = 131,072 tokens per step, 1.7 B, on text with long documents.
    dict(steps=13_000, block_size=16_384, global_batch_size=8, micro_batch_size=1,
         rope_theta=500_000, document_mask=True, dataset="books:0.5,code:0.5"),
    # 4 K again to step 230,000: 32 x 4,096 = 131,072 tokens per step, 3.0 B of the best text. The learning
    # rate decays.
    dict(steps=23_000, rope_theta=500_000, dataset="maths:0.4,qa:0.3,stem:0.3"),
]
eval_interval = 1000
eval_tokens = 10 * 2**20
save_interval = 1000
keep_checkpoints = 3
