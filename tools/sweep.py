"""Train one script at every point of a grid of settings, and draw what came out.

    python -m tools.sweep --grid="temperature=1,2,4 alpha=0.5,0.9,1 learning_rate=3e-3,6e-3" \\
        --words="--teacher=out/teacher --cache=none --max_steps=100" --png=docs/results/sweep.png

Each point of the grid is a run in its own folder under out_dir, named after its values. Finished runs are
not repeated, so the same command continues a sweep that was stopped. The result of a run is the metric in the
last event of its metrics.jsonl. The picture has the first key on the x axis, and one line for each choice of
the other values.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from configurator import UserError, configure, run_script
from formats.files import write_json
from tools.arms import require_writable, run_once, split


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    script: str = "distill.py"  # train.py, distill.py, sft.py or dpo.py
    grid: str = "temperature=1,2,4 alpha=0.5,0.9"  # one to three keys, each with its values
    words: str = ""  # arguments that every run gets
    metric: str = "val_loss"  # the key of metrics.jsonl to compare
    out_dir: str = "out/sweep"  # one folder per run is made here
    json: str | None = None  # write the results to this file
    png: str | None = None  # draw the results to this file

    @property
    def axes(self) -> dict[str, list[str]]:
        """{key: its values}. Raises UserError unless there are one to three keys."""
        parts = [part.partition("=") for part in self.grid.split()]
        axes = {key: values.split(",") for key, _, values in parts}
        is_whole = all(key and all(values) for key, values in axes.items())
        if not is_whole or not 1 <= len(axes) == len(parts) <= 3:
            raise UserError(f"grid={self.grid}: write one to three keys as key=1,2,3, with spaces between")
        return axes


def run_point(cfg: SweepConfig, point: dict[str, str]) -> float:
    """Train one point of the grid, unless its run is finished. Returns its metric."""
    settings = [f"{key}={value}" for key, value in point.items()]
    argv = [*split(cfg.words), *(f"--{setting}" for setting in settings), "--eval_interval=0"]
    value = run_once(cfg.script, argv, Path(cfg.out_dir) / "_".join(settings), cfg.metric)[-1][cfg.metric]
    print(f"{'  '.join(settings)}  {cfg.metric} {value:.4f}", flush=True)
    return value


def draw(axes: dict[str, list[str]], values: list[float], metric: str) -> Figure:
    """values: in the order of itertools.product, so that the first key varies slowest."""
    x_key, *others = axes
    figure = Figure(figsize=(6, 4), layout="constrained")
    plot = figure.add_subplot()
    lines = list(itertools.product(*(axes[key] for key in others)))
    for number, line in enumerate(lines):
        label = ", ".join(f"{key} {value}" for key, value in zip(others, line, strict=True))
        plot.plot(axes[x_key], values[number::len(lines)], marker="o", label=label)
    plot.set(xlabel=x_key, ylabel=metric)
    plot.grid(alpha=0.3)
    if others:
        plot.legend()
    return figure


def main(argv: list[str]) -> None:
    cfg, _ = configure(SweepConfig, argv, usage=__doc__)
    require_writable(cfg.json, cfg.png)
    points = [dict(zip(cfg.axes, values, strict=True)) for values in itertools.product(*cfg.axes.values())]
    values = [run_point(cfg, point) for point in points]
    if cfg.json:
        results = [point | {"value": value} for point, value in zip(points, values, strict=True)]
        write_json(Path(cfg.json), {"script": cfg.script, "words": cfg.words, "metric": cfg.metric,
                                    "points": results})
    if cfg.png:
        draw(cfg.axes, values, cfg.metric).savefig(cfg.png, dpi=150)


if __name__ == "__main__":
    run_script(main)
