# A student of 0.3 B parameters for the 1.1 B model of config/train_nanollama_1b.py, on eight GPUs. That
# file begins with the command that makes data/web.
#   torchrun --standalone --nproc_per_node=8 distill.py config/distill_nanollama.py
out_dir = "out/distill_nanollama"
teacher = "out/nanollama_1b"
student_layers = "every:1"
n_embd = 1024
n_head = 16
intermediate_size = 2816
dataset = "web"
block_size = 4096
global_batch_size = 128
micro_batch_size = 4
max_steps = 20_000  # 128 x 4,096 x 20,000 = 10.5 B tokens
learning_rate = 2e-3
weight_decay = 0.1
schedule = "wsd"
document_mask = True
activation_checkpointing = True
parallel = "fsdp"
eval_interval = 1000
save_interval = 1000
eval_tokens = 2**22
