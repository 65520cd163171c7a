"""What a teacher brings: the same student, taught in several ways, from the same text.

    python train.py --max_steps=1500 --out_dir=out/teacher
    python -m bench.teach --teacher=out/teacher --json=docs/results/distill.json
    python -m bench.teach --teacher=out/gpt2 --students=half --out_dir=out/teach_half --equal_time=1.7

Every arm is a run of distill.py with other words, for each seed. The students have a quarter of the teacher's
parameters, of the default model; or, of any teacher, half its layers, as DistilGPT-2 has. Finished runs are
not repeated, so the command may be cut and started again, or for other seeds and arms at once on another
core. Prints validation bits a byte, mean and range over the seeds; how much of the gap between the first arm
and the teacher is closed; how often both hold the same token likeliest; tokens a second. A quarter's caches
have to be there (tools/cache_teacher.py, --method=topk and --method=sample).
"""

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from configurator import UserError, configure, run_script
from formats.files import write_json

CUT = "--student_layers=0,2 --n_embd=128 --n_head=2 --intermediate_size=256"
SAME = "--n_layer=3 --n_embd=256 --n_head=4 --intermediate_size=768"
INSIDE = "hidden_weight=1.0, attention_weight=0.5, alpha=0.0"
HALF = "--student_layers=every:2"
QUARTER_ARMS = {  # {name: words of distill.py}
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
    "as large, teacher, 5 x the steps": SAME,  # those of the teacher, if it is the one above
}
HALF_ARMS = {
    "text alone, equal time": f"{HALF} --alpha=0",
    "teacher": HALF,
    "teacher, inside": f"{HALF} --hidden_weight=0.5 --attention_weight=0.25",
}


@dataclass(frozen=True, kw_only=True)
class TeachConfig:
    teacher: str = "out/teacher"  # model folder or out_dir
    dataset: str = "pystdlib"  # folder under data/ (or path)
    out_dir: str = "out/teach"  # a folder a run goes here
    students: Literal["quarter", "half"] = "quarter"  # size of the students, and so the arms
    seeds: str = "1,2,3"  # with commas between
    arms: str = "all"  # numbers of the arms, from 0, with commas between; all
    steps: int = 300  # of each run
    equal_time: float = 2.5  # times as many for "equal time": what a taught step costs beside one without
    json: str | None = None  # where the figures go, once all runs are there

    @property
    def words(self) -> dict[str, str]:
        return {"quarter": QUARTER_ARMS, "half": HALF_ARMS}[self.students]

    @property
    def runs(self) -> list[tuple[str, int]]:
        names = list(self.words)
        chosen = names if self.arms == "all" else [names[int(number)] for number in self.arms.split(",")]
        return [(name, int(seed)) for seed in self.seeds.split(",") for name in chosen]


def folder_of(cfg: TeachConfig, name: str, seed: int) -> Path:
    return Path(cfg.out_dir) / f"{name.replace(', ', '_').replace(' ', '-')}_{seed}"


def run(cfg: TeachConfig, name: str, seed: int) -> None:
    """One arm with one seed, in a process of its own; nothing to do where it is finished."""
    out, steps = folder_of(cfg, name, seed), steps_of(cfg, name)
    if is_finished(out, steps):
        return
    words = [f"--teacher={cfg.teacher}", f"--dataset={cfg.dataset}", f"--out_dir={out}", f"--seed={seed}",
             f"--max_steps={steps}", "--eval_interval=0", "--save_interval=0", "--log_interval=50",
             *cfg.words[name].split()]
    if "two stages" in name:
        out.mkdir(parents=True, exist_ok=True)
        config = out / "stages.py"
        config.write_text(f"stages = [dict(steps={steps // 3}, {INSIDE}), "
                          f"dict(steps={steps - steps // 3}, restart=True)]\n")
        words = [str(config), *(word for word in words if "max_steps" not in word)]
    script = Path(__file__).parent.parent / "distill.py"
    found = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"{name}: {found.stderr[-600:]}")
    print(f"{name}, seed {seed}: {events(out)[-1]['val_bits_per_byte']:.4f}", flush=True)


def steps_of(cfg: TeachConfig, name: str) -> int:
    times = cfg.equal_time if "equal time" in name else 5 if "5 x" in name else 1
    return round(times * cfg.steps)


def is_finished(out: Path, steps: int) -> bool:
    found = events(out)
    return bool(found) and "val_loss" in found[-1] and found[-1]["step"] == steps


def events(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def measured(cfg: TeachConfig) -> dict[str, Any]:
    """{arm: {"bits": one a seed, "tokens_per_second", "parameters", ...}} of the finished runs."""
    arms: dict[str, Any] = {}
    for name, seed in cfg.runs:
        found = events(folder_of(cfg, name, seed))
        if not is_finished(folder_of(cfg, name, seed), steps_of(cfg, name)):
            continue
        arm = arms.setdefault(name, {"bits": [], "speeds": [], "agreement": []})
        arm["bits"].append(found[-1]["val_bits_per_byte"])
        arm["speeds"] += [event["tokens_per_second"] for event in found if "tokens_per_second" in event]
        arm["agreement"] += [found[-1]["val_agreement"]] if "val_agreement" in found[-1] else []
        if "val_teacher_loss" in found[-1]:  # nats of the same targets, so bits in proportion
            ratio = found[-1]["val_teacher_loss"] / found[-1]["val_loss"]
            arms["the teacher itself"] = {"bits": [found[-1]["val_bits_per_byte"] * ratio], "speeds": [],
                                          "agreement": []}
    return arms


def table(arms: dict[str, Any]) -> str:
    """A line an arm, in Markdown; gaps are between the first one and the teacher."""
    plain = statistics.mean(next(iter(arms.values()))["bits"])
    best = arms["the teacher itself"]["bits"][0]
    lines = ["| taught by | bits per byte | gap closed | agrees with the teacher | tokens/s |",
             "|---|---|---|---|---|"]
    for name, arm in arms.items():
        bits = arm["bits"]
        mean = statistics.mean(bits)
        spread = f" ({min(bits):.3f} - {max(bits):.3f})" if len(bits) > 1 else ""
        agreement = f"{100 * statistics.mean(arm['agreement']):.1f} %" if arm["agreement"] else ""
        speed = f"{statistics.median(arm['speeds']):,.0f}" if arm["speeds"] else ""
        lines.append(f"| {name} | {mean:.3f}{spread} | {100 * (plain - mean) / (plain - best):.0f} % | "
                     f"{agreement} | {speed} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    cfg, _ = configure(TeachConfig, argv, usage=__doc__)
    for name, seed in cfg.runs:
        run(cfg, name, seed)
    arms = measured(cfg)
    if "the teacher itself" in arms:
        print(table(arms))
    if cfg.json:
        write_json(Path(cfg.json), {"command": "python -m bench.teach", "torch": torch.__version__,
                                    "steps": cfg.steps, "seeds": cfg.seeds, "arms": arms})
    return 0


if __name__ == "__main__":
    run_script(main)
