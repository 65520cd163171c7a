# What does each stage after pre-training bring? Stages that variants share are trained once per seed:
#     python -m tools.ablate config/ablate_pipeline.py --json=pipeline.json
# A verifier changes no greedy answer. What its choice among eight samples brings, compared with a vote:
#     python -m tools.ablate config/ablate_pipeline.py --changes=-verifier.py --json=verifier.json \
#         --base="['train.py', 'sft.py', 'dpo.py', 'grpo.py', 'verifier.py --num_problems=320']" \
#         --evaluate="--limit=100 --num_samples=8"

base = ["train.py", "sft.py", "dpo.py", "grpo.py"]
changes = {"without DPO": "-dpo.py", "without GRPO": "-grpo.py", "SFT only": "-dpo.py -grpo.py"}
tasks = "problems,calculator"
out_dir = "out/ablate_pipeline"
