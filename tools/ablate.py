"""Change one part of a recipe at a time, train every variant with several seeds, and compare with the base.

    python -m tools.ablate config/ablate_architecture.py --json=docs/results/ablate_architecture.json
    python -m tools.ablate config/ablate_pipeline.py --seeds=3 --tasks=problems,calculator
    python -m tools.ablate --base='["train.py --max_steps=100"]' --changes="position=none; n_kv_head=1"

`base` is a list of commands; each starts from the model of the one before. A change is a text: key=value
(one or several) is added to the first command, and -dpo.py leaves that command out. The table has the metric
of each variant: val_loss at the end or, with --tasks, the first figure of each task of eval.py. "difference"
is the mean over the seeds of variant minus base. "/ spread" is its size over the standard deviation of the
seeds' differences: below about 2, the seeds alone could have made it.

Runs are in out_dir, named by their commands: variants share the stages that are equal. The same command again
repeats no finished run. Left out: equal time in place of equal tokens, changes of later commands, and
combinations of changes (tools/sweep.py).
"""

import contextlib
import hashlib
import io
import shlex
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import eval as evaluation
from configurator import UserError, configure, require_positive, run_script
from formats.files import read_json, write_json
from formats.markdown import table
from model import GPT
from tools.arms import mean_and_range, run_arms, run_once


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    base: list = field(default_factory=lambda: ["train.py"])  # commands, without out_dir, init_from and seed
    changes: dict | str = ""  # {name: change}, or changes with ";" between them
    seeds: int = 3  # runs of each variant, with seeds 1, 2, ..
    tasks: str = ""  # tasks of eval.py, separated by commas; "" compares val_loss
    out_dir: str = "out/ablate"  # folder of the runs
    json: str | None = None  # write all results to this file
    png: str | None = None  # draw the differences to this file

    def __post_init__(self) -> None:
        require_positive(self, "seeds")
        if not all(isinstance(command, str) and command.strip() for command in self.base or [""]):
            raise UserError(f"base={self.base}: must be a list of commands, such as ['train.py --n_layer=2']")

    @property
    def variants(self) -> dict[str, list[str]]:
        """{name: commands}, the base first. Raises UserError for a change that is wrong."""
        named = self.changes
        if isinstance(named, str):
            named = {change.strip(): change for change in named.split(";") if change.strip()}
        return {name: variant(self.base, change) for name, change in {"base": "", **named}.items()}


def variant(base: list[str], change: str) -> list[str]:
    """The commands of a variant. Raises UserError for a change that is not key=value or a command's -name."""
    commands = list(base)
    for word in shlex.split(change):
        kept = [command for command in commands if "-" + command.split()[0] != word]
        if len(kept) == len(commands) and "=" not in word:
            raise UserError(f"changes: {word!r}: must be key=value, or -SCRIPT for one of {', '.join(base)}")
        commands = kept if len(kept) < len(commands) else [f"{commands[0]} --{word}", *commands[1:]]
    return commands


def task_figures(folder: Path, tasks: str) -> dict[str, float]:
    """The first figure of each task for the model in `folder`. A finished evaluation is not repeated."""
    out = folder / "_".join(["eval", *tasks.split(",")])
    if not (out / "results.json").is_file() or not read_json(out / "results.json")["complete"]:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.main([f"--model={folder}", f"--tasks={tasks}", f"--out_dir={out}"])
    measured = read_json(out / "results.json")["models"][0]["tasks"]
    return {task: next(iter(each["figures"].values()))["value"] for task, each in measured.items()}


def train_variant(cfg: AblateConfig, commands: list[str], seed: int) -> dict[str, Any]:
    """Run the commands one after the other. Returns {"metrics", "speed", "memory_gb", "parameters", ..}."""
    folder: Path | None = None
    for number, command in enumerate(commands, 1):
        script, *argv = shlex.split(command)
        argv += [f"--init_from={folder}"] if folder else []
        digest = hashlib.sha256(repr(commands[:number]).encode()).hexdigest()[:8]
        folder = Path(cfg.out_dir) / f"{Path(script).stem}_{digest}_{seed}"
        log = run_once(script, [*argv, f"--seed={seed}", "--eval_interval=0"], folder)
    assert folder is not None
    last, model = [event for event in log if "tokens" in event][-1], GPT.from_pretrained(folder)
    metrics = task_figures(folder, cfg.tasks) if cfg.tasks else {"val_loss": log[-1]["val_loss"]}
    print(f"{folder}: {metrics}", flush=True)
    return {"metrics": metrics, "speed": last["tokens"] / last["seconds"], "memory_gb": last["memory_gb"],
            "parameters": model.num_parameters(), "active": model.num_parameters(active=True)}


def differences(runs: list[dict[str, Any]], base: list[dict[str, Any]], metric: str) -> list[float]:
    return [one["metrics"][metric] - other["metrics"][metric] for one, other in zip(runs, base, strict=True)]


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    """One table per metric."""
    parts = []
    for metric in results["base"][0]["metrics"]:
        rows = []
        for name, runs in results.items():
            change = differences(runs, results["base"], metric)
            deviation = statistics.stdev(change) if len(change) > 1 else 0.0
            first = runs[0]
            active = f" ({first['active']:,} active)" if first["active"] < first["parameters"] else ""
            rows.append([name, mean_and_range([run["metrics"][metric] for run in runs]),
                         f"{statistics.mean(change):+.3f}" if name != "base" else "",
                         f"{abs(statistics.mean(change)) / deviation:.1f}" if deviation else "",
                         f"{statistics.mean(run['speed'] for run in runs):,.0f}",
                         f"{max(run['memory_gb'] for run in runs):.2f}", f"{first['parameters']:,}{active}"])
        headers = [f"{len(results['base'])} seeds", metric, "difference", "/ spread", "tokens/s", "GB"]
        parts.append(table([*headers, "parameters"], rows, "lrrrrrr"))
    return "\n\n".join(parts)


def draw(results: dict[str, list[dict[str, Any]]], path: str) -> None:
    """The difference of each variant: a bar for the mean and a point per seed."""
    metric = next(iter(results["base"][0]["metrics"]))
    figure = Figure(figsize=(8, 1 + 0.35 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate([name for name in results if name != "base"]):
        change = differences(results[name], results["base"], metric)
        axes.barh(place, statistics.mean(change), color="C0", alpha=0.5)
        axes.plot(change, [place] * len(change), "k.", markersize=4)
    axes.set_yticks(range(len(results) - 1), [name for name in results if name != "base"])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel=f"{metric}: difference from the base (points: seeds)")
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    cfg, _ = configure(AblateConfig, argv, usage=__doc__)
    arms = {name: partial(train_variant, cfg, commands) for name, commands in cfg.variants.items()}
    results = run_arms(arms, range(1, cfg.seeds + 1))
    print(report(results))
    if cfg.json:
        write_json(Path(cfg.json), {"base": cfg.base, "commands": cfg.variants, "runs": results})
    if cfg.png:
        draw(results, cfg.png)
    return 0


if __name__ == "__main__":
    run_script(main)
