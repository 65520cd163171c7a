"""Train one script at every point of a grid of settings, and draw what came out.

    python -m tools.sweep --grid="temperature=1,2,4 alpha=0.5,0.9,1 learning_rate=3e-3,6e-3" \\
        --words="--teacher=out/teacher --cache=none --max_steps=100" --png=docs/results/sweep.png

Each point of the grid is a run in its own folder under out_dir, named after its values. Finished runs are
not repeated, so the same command continues a sweep that was stopped. The result of a run is the metric in the
last event of its metrics.jsonl. The picture has the first key on the x axis, one line per value of the second
key, and one panel per value of the third.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from configurator import UserError, configure, run_script
from formats.files import write_json
from tools.arms import run_once


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
        if not 1 <= len(axes) <= 3 or not all(key and all(values) for key, values in axes.items()):
            raise UserError(f"grid={self.grid}: write one to three keys as key=1,2,3, with spaces between")
        return axes


def run_point(cfg: SweepConfig, point: dict[str, str]) -> float:
    """Train one point of the grid, unless its run is finished. Returns its metric."""
    settings = [f"{key}={value}" for key, value in point.items()]
    argv = [*cfg.words.split(), *(f"--{setting}" for setting in settings), "--eval_interval=0"]
    return run_once(cfg.script, argv, Path(cfg.out_dir) / "_".join(settings), cfg.metric)[-1][cfg.metric]


def draw(axes: dict[str, list[str]], results: list[dict], cfg: SweepConfig) -> None:
    """Save the picture as cfg.png."""
    x_key, line_key, panel_key = [*axes, None, None][:3]
    panels = axes.get(panel_key, [None])
    values = [result["value"] for result in results]
    margin = 0.05 * (max(values) - min(values)) or 1
    figure = Figure(figsize=(1 + 4 * len(panels), 4), layout="constrained")
    for number, panel in enumerate(panels, 1):
        plot = figure.add_subplot(1, len(panels), number)
        for line in axes.get(line_key, [None]):
            points = [r for r in results if r.get(line_key) == line and r.get(panel_key) == panel]
            plot.plot([r[x_key] for r in points], [r["value"] for r in points], marker="o",
                      label=None if line is None else f"{line_key} {line}")
        # All panels have the same y axis, so that they can be compared.
        plot.set(xlabel=x_key, ylabel=cfg.metric if number == 1 else "",
                 ylim=(min(values) - margin, max(values) + margin),
                 title="" if panel is None else f"{panel_key} {panel}")
        plot.grid(alpha=0.3)
        if line_key:
            plot.legend()
    figure.savefig(cfg.png, dpi=150)


def main(argv: list[str]) -> int:
    cfg, _ = configure(SweepConfig, argv, usage=__doc__)
    axes, results = cfg.axes, []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        results.append(point | {"value": run_point(cfg, point)})
        print("  ".join(f"{key} {value}" for key, value in point.items())
              + f"  {cfg.metric} {results[-1]['value']:.4f}", flush=True)
    if cfg.json:
        write_json(Path(cfg.json), {"script": cfg.script, "words": cfg.words, "metric": cfg.metric,
                                    "points": results})
    if cfg.png:
        draw(axes, results, cfg)
    return 0


if __name__ == "__main__":
    run_script(main)
