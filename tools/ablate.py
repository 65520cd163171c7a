"""Change one part of a recipe at a time, train every variant with several seeds, and compare with the base.

    python -m tools.ablate config/ablate_architecture.py --json=docs/results/ablate_architecture.json
    python -m tools.ablate config/ablate_pipeline.py --seeds=3 --tasks=problems,calculator
    python -m tools.ablate --base='["train.py --max_steps=100"]' --changes="position=none; n_kv_head=1"

`base` is a list of commands; each starts from the model of the one before. A change is a text: key=value
(one or several) is added to the first command, and -dpo.py leaves that command out. The table has the metric
of each variant: val_loss at the end or, with --tasks, the first figure of each task of eval.py. If --evaluate
has --num_samples=8, it is the accuracy of a vote of 8 answers or, if the last command is verifier.py, of the
answer that this verifier chooses.
"difference" is the mean over the seeds of variant minus base. "over spread" is its size over the standard
deviation of the seeds' differences: below about 2, the seeds alone could have made it.

Runs are in out_dir, named by their commands: variants share the stages that are equal. The same command again
repeats no finished run. All variants train on the same number of tokens. With --equal_time=True they train
for the same time: these runs time the first command, which is then run again with the steps that fit the
base's time. Left out: changes of later commands, and combinations of changes (tools/sweep.py).
"""

import hashlib
import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from configurator import UserError, configure, require_positive, run_script
from formats.files import write_json
from formats.markdown import table
from model import GPT
from tools.arms import mean_and_range, require_writable, run_arms, run_eval, run_once, split
from tools.plot import bar_chart

Runs = dict[str, list[dict[str, Any]]]  # {variant: one result of `train_variant` per seed}


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    base: list = field(default_factory=lambda: ["train.py"])  # commands, without out_dir, init_from and seed
    changes: dict | str = ""  # {name: change}, or changes with ";" between them
    seeds: int = 3  # runs of each variant, with seeds 1, 2, ..
    tasks: str = ""  # tasks of eval.py, separated by commas; "" compares val_loss
    evaluate: str = ""  # more words for eval.py, such as "--limit=200 --num_samples=8"
    equal_time: bool = False  # give the first commands equal training seconds, not equal steps
    out_dir: str = "out/ablate"  # folder of the runs
    json: str | None = None  # write all results to this file
    png: str | None = None  # draw the differences to this file

    def __post_init__(self) -> None:
        require_positive(self, "seeds")
        if not all(isinstance(command, str) and command.strip() for command in self.base or [""]):
            raise UserError(f"base={self.base}: must be a list of commands, such as ['train.py --n_layer=2']")
        for text in (*self.base, self.evaluate):
            split(text)  # raises UserError

    @property
    def variants(self) -> dict[str, list[str]]:
        """{name: commands}, the base first. Raises UserError for a change that is wrong."""
        named = self.changes
        if isinstance(named, str):
            named = {change.strip(): change for change in named.split(";") if change.strip()}
        if "base" in named or not all(isinstance(change, str) for change in named.values()):
            raise UserError(f"changes={named}: must be texts, and none is named base")
        return {name: variant(self.base, change) for name, change in {"base": "", **named}.items()}


def variant(base: list[str], change: str) -> list[str]:
    """The commands of a variant. Raises UserError for a change that is not key=value or a command's -name."""
    commands = list(base)
    for word in split(change):
        left_out = next((command for command in commands if "-" + command.split()[0] == word), None)
        if left_out:
            commands.remove(left_out)
        elif "=" in word and commands:
            commands[0] += " " + shlex.quote(f"--{word}")  # a value may have spaces
        else:
            raise UserError(f"changes: {word!r}: must be key=value, or -SCRIPT for one of {', '.join(base)}")
    if not commands:
        raise UserError(f"changes: {change!r}: leaves no command")
    return commands


def run_commands(cfg: AblateConfig, commands: list[str], seed: int) -> tuple[Path, dict[str, Any], float]:
    """Run the commands one after the other. Returns the last one's folder, last training event and val_loss.
    """
    folder = None
    for number, command in enumerate(commands, 1):
        script, *argv = shlex.split(command)
        argv += [f"--init_from={folder}"] if folder else []
        digest = hashlib.sha256(repr(commands[:number]).encode()).hexdigest()[:8]
        folder = Path(cfg.out_dir) / f"{Path(script).stem}_{digest}_{seed}"
        log = run_once(script, [*argv, f"--seed={seed}", "--eval_interval=0"], folder)
    return folder, [event for event in log if "tokens" in event][-1], log[-1]["val_loss"]


def at_equal_time(cfg: AblateConfig, first: str, seed: int) -> str:
    """The first command of a variant, with the steps that it takes in the training time of the base's."""
    base, own = (run_commands(cfg, [command], seed)[1] for command in (cfg.base[0], first))
    if base == own:
        return first
    return f"{first} --max_steps={max(1, round(own['step'] * base['seconds'] / own['seconds']))}"


def train_variant(cfg: AblateConfig, commands: list[str], seed: int) -> dict[str, Any]:
    """Run the commands. Returns {"metrics", "speed", "memory_gb", "parameters", ..}."""
    if cfg.equal_time:
        commands = [at_equal_time(cfg, commands[0], seed), *commands[1:]]
    folder, last, val_loss = run_commands(cfg, commands, seed)
    out_dir, argv, choice = folder / "eval", [f"--tasks={cfg.tasks}", *shlex.split(cfg.evaluate)], "maj@"
    if commands[-1].startswith("verifier.py"):
        argv, choice = [*argv, f"--verifier={folder}"], "verified@"
        folder = run_commands(cfg, commands[:-1], seed)[0]
    model, metrics = GPT.from_pretrained(folder), {"val_loss": val_loss}
    if cfg.tasks:
        found = run_eval([f"--model={folder}", *argv], out_dir)
        metrics = {}
        for task, figures in found.items():
            name = next((name for name in figures if name.startswith(choice)), next(iter(figures)))
            metrics[task] = figures[name]["value"]
    print(f"{folder}: {metrics}", flush=True)
    return {"metrics": metrics, "speed": last["tokens"] / last["seconds"], "memory_gb": last["memory_gb"],
            "parameters": model.num_parameters(), "active": model.num_parameters(active=True)}


def differences(results: Runs, metric: str) -> dict[str, list[float]]:
    """{variant: variant minus base, one value per seed}."""
    return {name: [one["metrics"][metric] - other["metrics"][metric]
                   for one, other in zip(runs, results["base"], strict=True)]
            for name, runs in results.items() if name != "base"}


def report(results: Runs, metric: str) -> str:
    """The table of a metric."""
    rows = []
    for name, runs in results.items():
        change, first = differences(results, metric).get(name, []), runs[0]
        deviation = stdev(change) if len(change) > 1 else 0.0
        active = f" ({first['active']:,} active)" if first["active"] < first["parameters"] else ""
        rows.append([name, mean_and_range([run["metrics"][metric] for run in runs]),
                     f"{mean(change):+.3f}" if change else "",
                     f"{abs(mean(change)) / deviation:.1f}" if deviation else "",
                     f"{mean(run['speed'] for run in runs):,.0f}",
                     f"{max(run['memory_gb'] for run in runs):.2f}", f"{first['parameters']:,}{active}"])
    headers = [f"seeds: {len(runs)}", metric, "difference", "over spread", "tokens/s", "GB", "parameters"]
    return table(headers, rows, "lrrrrrr")


def chart(results: Runs) -> Figure:
    """The differences of all metrics."""
    changes = {metric: differences(results, metric) for metric in results["base"][0]["metrics"]}
    return bar_chart(changes, "difference from the base (points: seeds)")


def main(argv: list[str]) -> None:
    cfg, _ = configure(AblateConfig, argv, usage=__doc__)
    require_writable(cfg.json, cfg.png)
    arms = {name: partial(train_variant, cfg, commands) for name, commands in cfg.variants.items()}
    results = run_arms(arms, range(1, cfg.seeds + 1))
    metrics = results["base"][0]["metrics"]
    print("\n\n".join(report(results, metric) for metric in metrics))
    if cfg.json:
        write_json(Path(cfg.json), {"base": cfg.base, "commands": cfg.variants, "runs": results})
    if cfg.png:
        chart(results).savefig(cfg.png, dpi=110)


if __name__ == "__main__":
    run_script(main)
