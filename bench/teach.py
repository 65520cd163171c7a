"""The effect of a teacher: the same student, trained in several ways on the same text.

    python train.py --max_steps=1500 --out_dir=out/teacher
    python -m bench.teach --teacher=out/teacher --json=docs/results/distill.json
    python -m bench.teach --teacher=out/gpt2 --students=half --out_dir=out/teach_half --equal_time=1.7

Every arm is distill.py with other arguments, run once per seed. The students of "quarter" have a quarter of
the parameters of the default model, as the teacher above. Those of "half" have half the layers of any
teacher, like DistilGPT-2. Those of "tokenizer" have a teacher with another tokenizer, and those of "details"
other losses, maps and batches. Those of "no_data" learn from token ids that tools/synthesize.py wrote, and
are judged on the text like the others:

    for kind in sampled uniform unlike; do
        python -m tools.synthesize --teacher=out/teacher --kind=$kind --tokens=600_000 --out=data/$kind; done
    python -m bench.teach --teacher=out/teacher --students=no_data --json=docs/results/no_data.json

Finished runs are kept, so the command may be stopped and started again.
Prints validation bits per byte (mean and range over the seeds); how much of the gap between the first arm and
the teacher is closed; how often student and teacher have the same most likely token; and tokens per second.
The arms with a cached teacher need its caches (tools/cache_teacher.py).
"""

import functools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bench.measure import run_benchmark, text_table
from configurator import run_script
from dataset.dataloader import Rows, dataset_folder
from dataset.shards import DataFolder
from distillation.alignment import Aligner
from distillation.divergences import DenseTeacher
from distillation.teacher import context_of, load_teacher
from formats import hf
from formats.tokenizer import Tokenizer
from tools.arms import mean_and_range, run_arms, run_eval, run_once

CUT = "--student_layers=0,2 --n_embd=128 --n_head=2 --intermediate_size=256"
SAME = "--n_layer=3 --n_embd=256 --n_head=4 --intermediate_size=768"
HALF = "--student_layers=every:2"
LAYER_LOSSES = "hidden_weight=1.0, attention_weight=0.5, alpha=0.0"  # the first of "two stages"
ARMS = {
    "quarter": {  # {name: arguments of distill.py}
        "text alone": "--alpha=0",
        "text alone, equal time": "--alpha=0",
        "teacher": "",
        "teacher, cached top-64": "--cache=topk",
        "teacher, cached samples": "--cache=sample",
        "cut out, text alone": f"{CUT} --alpha=0",
        "cut out, teacher": CUT,
        "cut out, teacher, inside": f"{CUT} --hidden_weight=0.5 --attention_weight=0.25",
        "cut out, two stages": CUT,
        "as large, teacher": SAME,
        "cut out, text alone, equal time": f"{CUT} --alpha=0",
        "cut out, cached samples, equal time": f"{CUT} --cache=sample",
        "as large, teacher, 5 x the steps": SAME},  # the steps of the teacher above
    "half": {
        "text alone, equal time": f"{HALF} --alpha=0",
        "teacher": HALF,
        "teacher, inside": f"{HALF} --hidden_weight=0.5 --attention_weight=0.25"},
    "tokenizer": {  # a teacher whose tokenizer is not the data's
        "text alone": "--align=bytes --cache=topk --alpha=0",
        "teacher, cached top-64": "--align=bytes --cache=topk",
        "teacher and text, cached top-64": "--align=bytes --cache=topk --alpha=0.5"},
    "details": {
        "text alone": "--alpha=0",
        "teacher": "",
        "teacher's embeddings": "--student_embeddings=teacher",
        "batch of 64, a quarter of the steps": "--global_batch_size=64",
        "batch of 64, a quarter of the steps, noise": "--global_batch_size=64 --gradient_noise=0.3",
        "cut out, teacher": CUT,
        "cut out, sinkhorn": f"{CUT} --hidden_weight=0.5 --hidden_loss=sinkhorn",
        "cut out, info_nce": f"{CUT} --hidden_weight=0.5 --hidden_loss=info_nce",
        "cut out, relations": f"{CUT} --attention_weight=0.25",
        "cut out, relations_mse": f"{CUT} --attention_weight=25 --attention_loss=relations_mse",
        "cut out, ternary": f"{CUT} --ternary=True",
        **{f"cut out, map {name}": f"{CUT} --hidden_weight=0.5 --layer_map={name}"
           for name in ("last", "last_k_uniform", "uniform_consecutive", "uniform_plus_last", "0:0,1:2")}},
    "no_data": {
        "text alone": "--alpha=0",
        "teacher": "--alpha=1",
        **{f"teacher, {kind}": f"--alpha=1 --dataset={kind}" for kind in ("sampled", "unlike", "uniform")}}}
TEACHER = "the teacher itself"
Logs = dict[str, list[list[dict[str, Any]]]]  # {arm: one log per seed}


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    teacher: str = "out/teacher"  # model folder or out_dir
    dataset: str = "pystdlib"  # folder under data/ (or path)
    out_dir: str = "out/teach"  # gets one folder per run
    students: Literal["quarter", "half", "tokenizer", "details", "no_data"] = "quarter"  # the arms
    seeds: str = "1,2,3"  # separated by commas
    arms: str = "all"  # numbers of the arms, from 0, separated by commas; or all
    steps: int = 300  # steps per run
    equal_time: float = 2.5  # factor on the steps of "equal time" arms: the cost of a teacher in a step
    json: str | None = None  # also write the results to this file

    @property
    def arm_names(self) -> list[str]:
        names = list(ARMS[self.students])
        return names if self.arms == "all" else [names[int(number)] for number in self.arms.split(",")]


def steps_of(cfg: TeachConfig, name: str) -> int:
    if "quarter of the steps" in name:
        return cfg.steps // 4
    if "equal time" in name:
        return round(cfg.equal_time * cfg.steps)
    return (5 if "5 x" in name else 1) * cfg.steps


def run_arm(cfg: TeachConfig, name: str, seed: int) -> list[dict[str, Any]]:
    """Run one arm with one seed unless it is finished; returns its log."""
    steps = steps_of(cfg, name)
    out = Path(cfg.out_dir) / f"{name.replace(', ', '_').replace(' ', '-')}_{seed}"
    argv = [f"--teacher={cfg.teacher}", f"--dataset={cfg.dataset}", f"--seed={seed}", "--eval_interval=0",
            "--save_interval=0", "--log_interval=50", *ARMS[cfg.students][name].split()]
    if "two stages" in name:
        out.mkdir(parents=True, exist_ok=True)
        (out / "stages.py").write_text(f"stages = [dict(steps={steps // 3}, {LAYER_LOSSES}), "
                                       f"dict(steps={steps - steps // 3}, restart=True)]\n")
        argv = [str(out / "stages.py"), *argv]
    else:
        argv.append(f"--max_steps={steps}")
    log = run_once("distill.py", argv, out, steps=steps)
    if cfg.students == "no_data":  # most logs have the figures of synthetic rows
        log[-1] = {"val_bits_per_byte": bits_on_text(cfg, str(out), out / "eval")}
    print(f"{name}, seed {seed}: {log[-1]['val_bits_per_byte']:.4f}", flush=True)
    return log


def bits_on_text(cfg: TeachConfig, model: str, out: Path) -> float:
    """The bits per byte of a model on the validation text."""
    figures = run_eval([f"--model={model}", "--tasks=perplexity",
                        f"--data=perplexity={dataset_folder(cfg.dataset)}"], out)
    return figures["perplexity"]["bits_per_byte"]["value"]


def summarize(logs: Logs) -> dict[str, Any]:
    """{arm: {"bits": one value per seed, "speeds": tokens per second, "agreement": one value per seed}}."""
    arms: dict[str, Any] = {}
    for name, runs in logs.items():
        last = [log[-1] for log in runs]
        arms[name] = {"bits": [event["val_bits_per_byte"] for event in last],
                      "speeds": [event["tokens_per_second"] for log in runs for event in log
                                 if "tokens_per_second" in event],
                      "agreement": [event["val_agreement"] for event in last if "val_agreement" in event]}
        for event in last:
            if "val_teacher_loss" in event:  # nats of the same targets, so its bits are in proportion
                ratio = event["val_teacher_loss"] / event["val_loss"]
                arms[TEACHER] = {"bits": [event["val_bits_per_byte"] * ratio], "speeds": [], "agreement": []}
    return arms


@torch.inference_mode()
def aligned_bits(cfg: TeachConfig) -> float:
    """The bits per byte of a teacher with another tokenizer, on the validation rows of its students."""
    data, folder = DataFolder(dataset_folder(cfg.dataset)), hf.find_folder(cfg.teacher)
    rows, tokenizer, device = Rows(data, "val", 128), Tokenizer.load(data.folder), torch.device("cpu")
    teacher = load_teacher(cfg.teacher, Tokenizer.load(folder), device, torch.bfloat16, 128)
    context = context_of(teacher)
    aligner, nats, count = Aligner(tokenizer, folder, context, device), 0.0, 0
    for row in rows.read(np.arange(len(rows))):
        _, theirs = aligner.tokens(row.tolist())
        theirs = theirs[:context + 1]
        ids, sizes = torch.from_numpy(theirs[:, 0]), theirs[1:, 2] - theirs[1:, 1]
        dense = teacher(ids[None, :-1], head=lambda hidden, weight: DenseTeacher(hidden[0], weight))
        log_q = dense.log_probs(slice(None), aligner.teacher.vocab_size, 1.0).gather(1, ids[1:, None])[:, 0]
        nats -= float(log_q.double()[torch.from_numpy(sizes > 0)].sum())
        count += int(sizes.sum())
    return nats / math.log(2) / count


def measure(cfg: TeachConfig) -> dict[str, Any]:
    """Run the arms: {"steps", "seeds", "arms": the result of `summarize`}."""
    logs = run_arms({name: functools.partial(run_arm, cfg, name) for name in cfg.arm_names},
                    map(int, cfg.seeds.split(",")))
    arms = summarize(logs)
    if cfg.students == "no_data":
        arms[TEACHER] = {"bits": [bits_on_text(cfg, cfg.teacher, Path(cfg.out_dir) / "teacher_eval")],
                         "speeds": [], "agreement": []}
    if cfg.students == "tokenizer":
        arms[TEACHER] = {"bits": [aligned_bits(cfg)], "speeds": [], "agreement": []}
    return {"steps": cfg.steps, "seeds": cfg.seeds, "arms": arms}


def report(results: dict[str, Any]) -> str:
    """One line per arm. The gap is the one between the first arm and the teacher."""
    arms = results["arms"]
    if TEACHER not in arms:
        return "no arm measured the teacher, so there is no gap to report"
    plain, best = statistics.mean(next(iter(arms.values()))["bits"]), arms[TEACHER]["bits"][0]
    rows = []
    for name, arm in arms.items():
        closed = (plain - statistics.mean(arm["bits"])) / (plain - best)
        rows.append([name, mean_and_range(arm["bits"]), f"{100 * closed:.0f} %",
                     f"{100 * statistics.mean(arm['agreement']):.1f} %" if arm["agreement"] else "",
                     f"{statistics.median(arm['speeds']):,.0f}" if arm["speeds"] else ""])
    headers = ["taught by", "bits per byte", "gap closed", "agrees with the teacher", "tokens/s"]
    return text_table(headers, rows)


def main(argv: list[str]) -> int:
    run_benchmark("bench.teach", TeachConfig, measure, report, argv, __doc__)
    return 0


if __name__ == "__main__":
    run_script(main)
