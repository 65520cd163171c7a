"""What reinforcement learning adds to a fine-tuned model, and what cheaper methods add in the same time.

    python -m bench.reason --init_from=out/sft --folder=out/reason --json=docs/results/reason.json
    python -m bench.reason --init_from=out/sft --folder=out/reason --png=docs/results/reason.png
    python -m bench.reason --init_from=out/grpo --arms=none --folder=out/measured   # only measure a model

Every arm starts from the same model and trains with each seed. The test problems are those of eval.py, from
the test split: without a tool ("problems"), with the calculator offered, and products of three digits with
the calculator offered. An answer counts if it is exactly right. These columns have one greedy answer per
problem; "mean@8" and "pass@8" have eight answers at temperature 1 to problems without a tool: the share of
right answers, and of problems with at least one.

    tools      grpo.py, the calculator offered in half of the prompts
    problems   grpo.py without the calculator: answers that the model works out itself
    long       the same with 6.7 times the answers and three times the rate
    mixed      problems with --refill=True, so that every group has right and wrong answers
    weak       problems, only families in which the model has room to improve
    more sft   sft.py goes on at the rate of its own schedule
    after sft  long, from the model of "more sft"
    rejection  sft.py on the model's own right answers
    own pairs  dpo.py on pairs of a right and a wrong answer of the model

Finished runs and measurements stay in the folder, so the same command goes on after a stop. The time of an
arm is the CPU seconds of its training, data included; after a stop it counts only what was left to do.
"""

import json
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from bench.measure import run_benchmark, text_table, write_jsonl
from configurator import UserError, require_positive, run_script
from dataset.problems import FAMILIES, Problem, is_right, problems, prompt_of
from formats import hf
from formats.chat_format import encode_prompt
from formats.checkpoint import step_folders
from formats.files import read_json, read_jsonl, write_json
from formats.tokenizer import Tokenizer
from generation.rollouts import Limits, RolloutSampler
from model import GPT
from tools import make_pairs
from tools.arms import mean_and_range, run_arms, run_once, run_process

SHARED = ["--device=cpu", "--eval_interval=0", "--save_interval=20", "--log_interval=1"]
GRPO = {  # {arm: arguments of grpo.py}
    "tools": ["--calculator=0.5", "--learning_rate=3e-4", "--max_steps=30", "--global_batch_size=64"],
    "problems": ["--calculator=0", "--learning_rate=1e-4", "--max_steps=60"],
    "long": ["--calculator=0", "--learning_rate=3e-4", "--max_steps=200", "--global_batch_size=64"],
    "mixed": ["--calculator=0", "--learning_rate=1e-4", "--max_steps=40", "--refill=True"],
    "weak": ["--calculator=0", "--learning_rate=1e-4", "--max_steps=60",
             "--families=sort,date,subtract,count"]}
SFT = ["--max_steps=400", "--learning_rate=3e-3", "--warmup_steps=0"]  # from the middle of sft.py's decay
TASKS = {  # {column: (families, whether the calculator is offered)}
    "problems": (tuple(name for name in FAMILIES if name != "hard"), False),
    "calculator": (("add", "subtract", "multiply", "story", "hard"), True),
    "products": (("hard",), True)}
SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class ReasonConfig:
    init_from: str = "out/sft"  # the fine-tuned model that every arm starts from
    folder: str = "out/reason"  # folder of the runs and measurements
    arms: str = "tools,problems,long,mixed,weak,more sft,after sft,rejection,own pairs"  # or none
    seeds: int = 3  # runs per arm, with the seeds 1, 2, ..
    limit: int = 1000  # test problems per column
    sampled: int = 300  # test problems that get eight answers
    json: str | None = None  # also write the results to this file
    png: str | None = None  # draw the rewards of the GRPO arms to this file

    def __post_init__(self) -> None:
        require_positive(self, "seeds", "limit", "sampled")
        if unknown := [arm for arm in self.names if arm not in (*GRPO, *OTHERS)]:
            raise UserError(f"arms={self.arms}: no arm {unknown[0]!r}; there are "
                            f"{', '.join((*GRPO, *OTHERS))}")
        if self.png and not set(GRPO) & set(self.names):
            raise UserError(f"png={self.png}: no arm of grpo.py is in arms={self.arms}")

    @property
    def names(self) -> list[str]:
        return [] if self.arms == "none" else self.arms.split(",")


# ---- Training ---------------------------------------------------------------------------------------------

def judged_pairs(cfg: ReasonConfig, folder: Path, seed: int) -> list[dict[str, Any]]:
    """Pairs of a right and a wrong answer of the start model to 1,500 training problems of all families."""
    path = folder.with_name(f"pairs_{seed}.jsonl")
    if not path.exists():
        make_pairs.main([f"--model={cfg.init_from}", f"--out={path}", f"--seed={seed}", "--num_problems=1500",
                         "--num_samples=8", f"--cache={folder.with_name(f'judged_{seed}')}", "--device=cpu",
                         f"--families={','.join(TASKS['problems'][0])}"])
    return read_jsonl(path)


def more_sft(cfg: ReasonConfig, folder: Path, seed: int) -> None:
    run_once("sft.py", [f"--init_from={cfg.init_from}", f"--seed={seed}", *SFT, *SHARED], folder, threads=1)


def after_sft(cfg: ReasonConfig, folder: Path, seed: int) -> None:
    start = folder.with_name(f"more_sft_{seed}")
    more_sft(cfg, start, seed)
    run_once("grpo.py", [f"--init_from={start}", f"--seed={seed}", *SHARED, *GRPO["long"]], folder, threads=1)


def rejection(cfg: ReasonConfig, folder: Path, seed: int) -> None:
    """Fine-tune on the right answers of the pairs, for one pass of 100 steps."""
    rows, path = judged_pairs(cfg, folder, seed), folder.with_name(f"right_{seed}.jsonl")
    write_jsonl(path, [{"messages": row["prompt"] + row["chosen"]} for row in rows])
    data = folder.with_name(f"right_{seed}")
    run_process("prepare.py", ["--kind=chat", f"--source={path}", f"--tokenizer={cfg.init_from}",
                               f"--out={data}", "--val_fraction=0.1"], threads=1)
    run_once("sft.py", [f"--init_from={cfg.init_from}", f"--dataset={data}", f"--seed={seed}",
                        "--max_steps=100", "--learning_rate=3e-4", *SHARED], folder, threads=1)


def own_pairs(cfg: ReasonConfig, folder: Path, seed: int) -> None:
    path, data = folder.with_name(f"pairs_{seed}.jsonl"), folder.with_name(f"pairs_{seed}")
    judged_pairs(cfg, folder, seed)
    run_process("prepare.py", ["--kind=preference", f"--source={path}", f"--tokenizer={cfg.init_from}",
                               f"--out={data}", "--val_fraction=0.1"], threads=1)
    run_once("dpo.py", [f"--init_from={cfg.init_from}", f"--dataset={data}", f"--seed={seed}", *SHARED],
             folder, threads=1)


OTHERS: dict[str, Callable[[ReasonConfig, Path, int], None]] = {
    "more sft": more_sft, "after sft": after_sft, "rejection": rejection, "own pairs": own_pairs}


# ---- Measuring --------------------------------------------------------------------------------------------

def test_problems(families: Sequence[str], limit: int) -> list[Problem]:
    """The first `limit` different test problems, as in eval.py."""
    found: dict[str, Problem] = {}
    for problem in islice(problems("test", 1, tuple(families)), 20 * limit):
        if len(found) < limit:
            found.setdefault(problem.key, problem)
    return list(found.values())


def right_answers(model: GPT, tokenizer: Tokenizer, questions: list[Problem], offered: bool, samples: int,
                  temperature: float) -> list[list[bool]]:
    """Whether each of `samples` answers to each problem is right."""
    sampler = RolloutSampler(model, tokenizer, Limits(max_new_tokens=120, block_size=model.config.block_size,
                                                      temperature=temperature))
    right: list[list[bool]] = []
    for first in range(0, len(questions), 256 // samples):
        part = questions[first:first + 256 // samples]
        ids = [encode_prompt(tokenizer, prompt_of(problem, offered)) for problem in part]
        rows = range(first * samples, (first + len(part)) * samples)
        rollouts = sampler.sample(ids, rows, samples, [offered] * len(part))
        right += [[is_right(problem, each.messages[-1]) and "cut" not in each.messages[-1]
                   for each in rollouts[i * samples:(i + 1) * samples]] for i, problem in enumerate(part)]
    return right


def measure_model(cfg: ReasonConfig, path: str) -> dict[str, float]:
    """Greedy accuracy of every column, and mean@8 and pass@8 of the first one, in percent."""
    folder = hf.find_folder(path)
    model, tokenizer = GPT.from_pretrained(folder).eval(), Tokenizer.load(folder)
    results = {}
    for name, (families, offered) in TASKS.items():
        right = right_answers(model, tokenizer, test_problems(families, cfg.limit), offered, 1, 0.0)
        results[name] = 100 * statistics.mean(each[0] for each in right)
    questions = test_problems(TASKS["problems"][0], cfg.sampled)
    right = right_answers(model, tokenizer, questions, False, SAMPLES, 1.0)
    results["mean@8"] = 100 * statistics.mean(map(statistics.mean, right))
    results["pass@8"] = 100 * statistics.mean(map(any, right))
    return results


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def run_arm(cfg: ReasonConfig, arm: str, seed: int) -> dict[str, float]:
    """Train an arm with a seed and measure its last checkpoint, unless that has been done."""
    folder = Path(cfg.folder) / f"{arm.replace(' ', '_')}_{seed}"
    done = folder.with_suffix(".json")
    if done.exists():
        return read_json(done)
    before = cpu_seconds()
    if arm in GRPO:
        run_once("grpo.py", [f"--init_from={cfg.init_from}", f"--seed={seed}", *SHARED, *GRPO[arm]], folder,
                 threads=1)
    else:
        OTHERS[arm](cfg, folder, seed)
    spent = cpu_seconds() - before
    results = {"seed": seed, "cpu_seconds": spent} | measure_model(cfg, str(step_folders(folder)[-1]))
    print(f"{arm:10} seed {seed}: {json.dumps(results)}", flush=True)
    write_json(done, results)
    return results


def measure(cfg: ReasonConfig) -> dict[str, Any]:
    """{"start": its figures, "arms": {arm: [figures per seed]}}."""
    torch.set_num_threads(1)
    Path(cfg.folder).mkdir(parents=True, exist_ok=True)
    done = Path(cfg.folder) / "start.json"
    start = read_json(done) or measure_model(cfg, cfg.init_from)
    write_json(done, start)
    arms = {arm: partial(run_arm, cfg, arm) for arm in cfg.names}
    results = {"start": start, "arms": run_arms(arms, range(1, cfg.seeds + 1))}
    if cfg.png:
        draw_rewards(cfg).savefig(cfg.png, dpi=130)
    return results


def draw_rewards(cfg: ReasonConfig) -> Figure:
    """The share of right sampled answers at each step, one panel per GRPO arm, one line per seed."""
    arms = [arm for arm in cfg.names if arm in GRPO]
    picture = Figure((3.2 * len(arms), 3), layout="constrained")
    for axes, arm in zip(picture.subplots(1, len(arms), sharey=True, squeeze=False)[0], arms, strict=True):
        for path in sorted(Path(cfg.folder).glob(f"{arm}_*/metrics.jsonl")):
            events = [event for event in read_jsonl(path) if "reward/answer" in event]
            rewards = [event["reward/answer"] for event in events]
            # The mean of ten steps, because 256 answers to 32 prompts vary much.
            smooth = [statistics.mean(rewards[max(0, i - 9):i + 1]) for i in range(len(rewards))]
            axes.plot([event["step"] for event in events], smooth, label=path.parent.name.split("_")[-1])
        axes.set(title=arm, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(title="seed")
    picture.axes[0].set_ylabel("right answers, mean of 10 steps")
    return picture


def report(results: dict[str, Any]) -> str:
    """One line per arm: the mean over the seeds, and the lowest and highest."""
    names = list(results["start"])
    lines = [["start", "", *[f"{results['start'][name]:.1f}" for name in names]]]
    for arm, runs in results["arms"].items():
        lines.append([arm, f"{statistics.mean(run['cpu_seconds'] for run in runs):.0f}",
                      *[mean_and_range([run[name] for run in runs], 1) for name in names]])
    return text_table(["", "CPU s", *names], lines)


def main(argv: list[str]) -> int:
    run_benchmark("bench.reason", ReasonConfig, measure, report, argv, __doc__)
    return 0


if __name__ == "__main__":
    run_script(main)
