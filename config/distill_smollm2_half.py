# Half the layers of SmolLM2-135M-Instruct, on text with its tokenizer. For chats, prepare with --kind=chat.
#   python -m tools.get_smollm2 --out=out/smollm2
#   python prepare.py --source=FILES --tokenizer=out/smollm2 --out=data/smol
#   python distill.py config/distill_smollm2_half.py
# --ternary=True makes a 1.58-bit student, --new_weights=True starts from random weights.
out_dir = "out/distill_smollm2_half"
teacher = "out/smollm2"
student_layers = "every:2"
dataset = "smol"
block_size = 256
global_batch_size = 16
micro_batch_size = 4
max_steps = 400
learning_rate = 5e-4
lr_multipliers = {}
weight_decay = 0.1
eval_interval = 100
save_interval = 100
eval_tokens = 2**15
