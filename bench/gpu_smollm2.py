"""What one GPU makes of SmolLM2-135M-Instruct: half of its layers, longer contexts, and word problems.

    python -m bench.gpu_smollm2 --arm=cut       # every second layer, not trained
    python -m bench.gpu_smollm2 --arm=text      # trained on C++ documentation alone
    python -m bench.gpu_smollm2 --arm=teacher   # trained by the whole model; also: ternary
    python -m bench.gpu_smollm2 --arm=sft       # fine-tuned on GSM8K's training problems
    python -m bench.gpu_smollm2 --arm=grpo      # then reinforcement learning (config/grpo_gsm8k.py)
    python -m bench.gpu_smollm2 --arm=needle    # a number in 16,384 tokens of text

Reads the files that bench/gpu.py lists from --inputs. Half models are measured by their perplexity on
WikiText-2 and on the validation pages of the C++ documentation, compared with --arm=whole. sft and grpo are
measured on GSM8K's test problems without worked examples. A stopped command goes on when it is called again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench.gpu_run import InputsConfig, report
from bench.measure import run_benchmark
from configurator import run_script
from dataset.dataloader import Rows
from distillation.pruning import kept_layers, prune, pruned_config
from formats.tokenizer import Tokenizer
from model import GPT
from tools.arms import run_eval, run_once

HALF = "every:2"
STUDENTS = {"text": ["--alpha=0"], "teacher": [], "ternary": ["--ternary=True"]}  # arguments of distill.py
DISTILL = ["--global_batch_size=64", "--micro_batch_size=32", "--block_size=512", "--max_steps=1000",
           "--eval_interval=0", "--save_interval=100"]
TOY_DISTILL = ["--global_batch_size=4", "--micro_batch_size=4", "--block_size=32", "--max_steps=3",
               "--eval_interval=0", "--eval_tokens=256"]
SFT = ["--global_batch_size=32", "--micro_batch_size=32", "--block_size=512", "--max_steps=400",
       "--optimizer=adamw", "--learning_rate=2e-5", "--eval_interval=0", "--save_interval=100",
       "--sample_answers=0"]
TOY_SFT = ["--global_batch_size=4", "--micro_batch_size=4", "--block_size=64", "--max_steps=2",
           "--eval_interval=0", "--eval_tokens=256", "--sample_answers=0"]
GRPO = ["--max_steps=100", "--save_interval=5", "--eval_interval=0", "--eval_prompts=64"]
TOY_GRPO = ["--max_steps=1", "--block_size=128", "--group_size=2", "--global_batch_size=2",
            "--micro_batch_size=2", "--max_new_tokens=4", "--eval_prompts=2", "--eval_interval=0"]


@dataclass(frozen=True, kw_only=True)
class Config(InputsConfig):
    arm: Literal["whole", "cut", "text", "teacher", "ternary", "sft", "grpo", "needle"] = "whole"  # figure

    def out(self, arm: str) -> Path:
        return Path(self.work) / "smollm2" / arm


def half_model(cfg: Config, teacher: str) -> Path:
    """The folder of half the layers: cut out of the teacher, and trained unless the arm is "cut"."""
    out, data = cfg.out(cfg.arm), cfg.prepared("smollm2_data", ["cpp_docs*"], tokenizer=teacher)
    if cfg.arm == "cut":
        whole, tokenizer = GPT.from_pretrained(teacher), Tokenizer.load(teacher)
        layers = kept_layers(HALF, whole.config.n_layer)
        ids = torch.from_numpy(Rows(data, "val", 32).read(np.arange(1))[:, :-1])
        half = prune(whole, pruned_config(whole.config, layers, {}), layers, ids)
        half.save_pretrained(out, eos_token_id=tokenizer.end_ids)
        tokenizer.save(out)
        return out
    run_once("distill.py", ["config/distill_smollm2_half.py", f"--teacher={teacher}",
                            f"--dataset={data.folder}", f"--student_layers={HALF}", *STUDENTS[cfg.arm],
                            *(TOY_DISTILL if cfg.toy else DISTILL), f"--device={cfg.device}"], out)
    return out


def perplexities(cfg: Config, model: str | Path) -> dict[str, Any]:
    """{text: figures of eval.py} on WikiText-2 and on the validation pages of the C++ documentation."""
    texts = {"wikitext2": cfg.find("wikitext*"), "cpp": str(Path(cfg.work) / "smollm2_data")}
    limit = ["--limit=8"] if cfg.toy else []
    return {name: run_eval([f"--model={model}", "--tasks=perplexity", f"--data=perplexity={place}", *limit,
                            f"--device={cfg.device}"], cfg.out(f"{cfg.arm}_{name}"))["perplexity"]
            for name, place in texts.items()}


def problem_solver(cfg: Config, model: str) -> Path:
    """The out_dir of the arm: fine-tuning on GSM8K, or reinforcement learning from there."""
    rows = cfg.find("gsm8k_train*")
    if cfg.arm == "sft":
        data = cfg.prepared("gsm8k_data", ["gsm8k_train*"], kind="chat", task="gsm8k", tokenizer=model)
        run_once("sft.py", [f"--init_from={model}", f"--dataset={data.folder}", f"--device={cfg.device}",
                            *(TOY_SFT if cfg.toy else SFT)], cfg.out("sft"))
    else:
        run_once("grpo.py", ["config/grpo_gsm8k.py", f"--init_from={cfg.out('sft')}", f"--dataset={rows}",
                             f"--device={cfg.device}", *(TOY_GRPO if cfg.toy else GRPO)], cfg.out("grpo"),
                 metric="val_reward")
    return cfg.out(cfg.arm)


def measure(cfg: Config) -> dict[str, Any]:
    """{"model": the folder, and the figures of eval.py by text or task}."""
    smollm2, ask = cfg.find("smollm2"), ["--chat=True", f"--device={cfg.device}"]
    if cfg.arm == "needle":
        size = ["--context_length=256", "--num_tests=2"] if cfg.toy else ["--context_length=16384",
                                                                          "--num_tests=25"]
        return {"model": smollm2, "needle": run_eval([f"--model={smollm2}", "--tasks=needle", *size, *ask,
                                                      f"--dtype={'float32' if cfg.toy else 'bfloat16'}"],
                                                     cfg.out("needle"))["needle"]}
    if cfg.arm in ("sft", "grpo"):
        model = problem_solver(cfg, smollm2)
        figures = run_eval([f"--model={model}", "--tasks=gsm8k", f"--data=gsm8k={cfg.inputs}", "--shots=0",
                            f"--limit={2 if cfg.toy else 500}", *ask], cfg.out(f"{cfg.arm}_gsm8k"))
        return {"model": str(model), "gsm8k": figures["gsm8k"]}
    model = smollm2 if cfg.arm == "whole" else str(half_model(cfg, smollm2))
    if cfg.arm == "whole":  # the validation pages are those of every arm
        cfg.prepared("smollm2_data", ["cpp_docs*"], tokenizer=smollm2)
    return {"model": model, **perplexities(cfg, model)}


def main(argv: list[str]) -> int:
    run_benchmark("bench.gpu_smollm2", Config, measure, report, argv, __doc__)
    return 0


if __name__ == "__main__":
    run_script(main)
