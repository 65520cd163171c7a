# Word problems of grade school, for an open model that sft.py has trained on the same rows.
#   python prepare.py --kind=chat --task=gsm8k --source=gsm8k_train.jsonl --tokenizer=MODEL --out=data/gsm8k
#   python sft.py --init_from=MODEL --dataset=gsm8k --block_size=512 --optimizer=adamw --out_dir=out/sft_gsm8k
#   python grpo.py config/grpo_gsm8k.py --init_from=out/sft_gsm8k --dataset=gsm8k_train.jsonl
out_dir = "out/grpo_gsm8k"
task = "gsm8k"
block_size = 512
max_new_tokens = 300
group_size = 16
global_batch_size = 32  # prompts, with 16 answers each
micro_batch_size = 4
max_steps = 200
optimizer = "adamw"
learning_rate = 2e-6
schedule = "constant"
warmup_steps = 5
activation_checkpointing = True
