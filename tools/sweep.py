"""A grid of runs of one script, and a picture of what came out; cut, it goes on where it was.

    python -m tools.sweep --grid="temperature=1,2,4 alpha=0.5,0.9,1 learning_rate=3e-3,6e-3" \\
        --words="--teacher=out/teacher --cache=none --max_steps=100" --png=docs/results/sweep.png

Every point of the grid is a run in a folder of its own under out_dir, named by its values; finished ones are
not repeated. The last value of the metric that a run logged counts. The picture has a panel for each value of
the third key, the second key's values as lines and the first's along the axis.
"""

import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, configure, run_script
from formats.files import write_json

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    script: str = "distill.py"  # train.py, distill.py, sft.py or dpo.py
    grid: str = "temperature=1,2,4 alpha=0.5,0.9"  # one to three keys and their values
    words: str = ""  # what all runs are given besides
    metric: str = "val_loss"  # of metrics.jsonl
    out_dir: str = "out/sweep"  # a folder a run goes here
    json: str | None = None  # where the figures go
    png: str | None = None  # also draw them here (needs matplotlib)

    @property
    def axes(self) -> dict[str, list[str]]:
        """{key: its values}. UserError for anything else than one to three."""
        parts = [part.partition("=") for part in self.grid.split()]
        axes = {key: values.split(",") for key, _, values in parts}
        if not 1 <= len(axes) <= 3 or not all(key and all(values) for key, values in axes.items()):
            raise UserError(f"grid={self.grid}: write one to three keys as key=1,2,3, with spaces between")
        return axes


def run(cfg: SweepConfig, point: dict[str, str]) -> float:
    """The metric of one point of the grid: its run, unless it is finished."""
    out = Path(cfg.out_dir) / "_".join(f"{key}={value}" for key, value in point.items())
    if (value := last(out, cfg.metric)) is None:
        words = [*cfg.words.split(), *(f"--{key}={value}" for key, value in point.items())]
        words.append(f"--out_dir={out}")
        found = subprocess.run([sys.executable, str(ROOT / cfg.script), *words, "--eval_interval=0"],
                               capture_output=True, text=True)
        if found.returncode:
            raise UserError(f"{' '.join(words)}: {found.stderr.strip()[-400:]}")
        value = last(out, cfg.metric)
    if value is None:
        raise UserError(f"metric={cfg.metric}: {out / 'metrics.jsonl'} has none")
    return value


def last(out: Path, metric: str) -> float | None:
    """The metric of a finished run's last event, else None."""
    path = out / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return events[-1].get(metric) if events else None


def draw(axes: dict[str, list[str]], figures: list[dict], cfg: SweepConfig) -> None:
    """The picture. UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("png: needs matplotlib (pip install matplotlib)") from None
    names = [*axes, None, None][:3]
    panels = axes.get(names[2], [None])
    figure = Figure(figsize=(1 + 4 * len(panels), 4), layout="constrained")
    for number, panel in enumerate(panels, 1):
        plot = figure.add_subplot(1, len(panels), number)
        for line in axes.get(names[1], [None]):
            points = [f for f in figures if f.get(names[1]) == line and f.get(names[2]) == panel]
            plot.plot([f[names[0]] for f in points], [f["value"] for f in points], marker="o",
                      label=None if line is None else f"{names[1]} {line}")
        low, high = (pick(f["value"] for f in figures) for pick in (min, max))
        margin = 0.05 * (high - low) or 1
        plot.set(xlabel=names[0], ylabel=cfg.metric if number == 1 else "",
                 ylim=(low - margin, high + margin), title="" if panel is None else f"{names[2]} {panel}")
        plot.grid(alpha=0.3)
        if names[1]:
            plot.legend()
    figure.savefig(cfg.png, dpi=150)


def main(argv: list[str]) -> int:
    cfg, _ = configure(SweepConfig, argv, usage=__doc__)
    axes, figures = cfg.axes, []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        figures.append(point | {"value": run(cfg, point)})
        print("  ".join(f"{key} {value}" for key, value in point.items())
              + f"  {cfg.metric} {figures[-1]['value']:.4f}", flush=True)
    if cfg.json:
        write_json(Path(cfg.json), {"script": cfg.script, "words": cfg.words, "metric": cfg.metric,
                                    "points": figures})
    if cfg.png:
        draw(axes, figures, cfg)
    return 0


if __name__ == "__main__":
    run_script(main)
