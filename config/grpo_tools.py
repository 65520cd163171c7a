# Learn to call the calculator from right answers alone. The model of sft.py has seen calls, but answers most
# offers itself or refuses. The rate keeps its peak for 70 % of the steps: a call has to become likely first.
#   python grpo.py config/grpo_tools.py
out_dir = "out/grpo_tools"
calculator = 0.75
learning_rate = 3e-4
schedule = "wsd"
max_steps = 60
