# What does each stage after pre-training bring? Stages that variants share are trained once per seed:
#     python -m tools.ablate config/ablate_pipeline.py --json=pipeline.json

base = ["train.py", "sft.py", "dpo.py", "grpo.py"]
changes = {"without DPO": "-dpo.py", "without GRPO": "-grpo.py", "SFT only": "-dpo.py -grpo.py"}
tasks = "problems,calculator"
out_dir = "out/ablate_pipeline"
