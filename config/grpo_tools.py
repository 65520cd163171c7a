# Learn to call the calculator from right answers alone. The model of sft.py has seen calls, but answers most
# offers itself or refuses. More steps, or a rate that stays high, cost points in problems without a tool, and
# so do fewer prompts per step, because their gradient is noisier.
#   python grpo.py config/grpo_tools.py
out_dir = "out/grpo_tools"
learning_rate = 3e-4
max_steps = 30
global_batch_size = 64
