"""Draw the curves of one or more runs: loss, learning rate and speed against the step.

    python -m tools.plot out/base                          # writes out/base/curves.png
    python -m tools.plot out/base out/more --out=both.png  # several runs in one picture

Reads metrics.jsonl of each run; training/curves.py draws. A run keeps a picture of itself in loss.png, and
replaces it at each evaluation. curves.png has another name, so that no run overwrites it.
`bar_chart` draws the pictures of tools/errors.py and tools/ablate.py.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from configurator import UserError, configure, require, run_script
from formats.files import read_jsonl
from training.curves import draw


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    out: str | None = None  # the picture's file; None writes curves.png into the first run's folder


def bar_chart(series: dict[str, dict[str, list[float]]], xlabel: str) -> Figure:
    """Bars for {series: {label: values}}, in one color per series: the mean, and points for several values.

    All series have the same labels.
    """
    labels = list(next(iter(series.values()), {}))
    figure = Figure(figsize=(8, 1 + len(labels) * (0.2 + 0.15 * len(series))), layout="constrained")
    axes, height = figure.subplots(), 0.8 / max(len(series), 1)
    for number, (name, bars) in enumerate(series.items()):
        places = np.arange(len(labels)) + (number + 0.5) * height - 0.4
        axes.barh(places, [np.mean(values) for values in bars.values()], height, label=name, alpha=0.6)
        for place, values in zip(places, bars.values(), strict=True):
            axes.plot(values, [place] * len(values), "k." if len(values) > 1 else "", markersize=4)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel=xlabel)
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    return figure


def main(argv: list[str]) -> None:
    # Arguments without -- are run folders here, not config files.
    cfg, _ = configure(PlotConfig, [arg for arg in argv if arg.startswith("-")], usage=__doc__)
    folders = [Path(arg) for arg in argv if not arg.startswith("-")]
    if not folders:
        raise UserError("name a run folder: python -m tools.plot out/base")
    kind = Path(cfg.out or "curves.png").suffix.lower()[1:]
    require(cfg, "out", kind in FigureCanvasBase.filetypes, "the name of a picture, such as curves.png")
    runs = {str(folder): read_jsonl(folder / "metrics.jsonl") for folder in folders}
    for name, events in runs.items():
        if not any("loss" in event or "val_loss" in event for event in events):
            raise UserError(f"{name}: no run here (no losses in its metrics.jsonl)")
    path = Path(cfg.out) if cfg.out else folders[0] / "curves.png"
    draw(runs).savefig(path, dpi=110)
    print(f"curves    {path}")


if __name__ == "__main__":
    run_script(main)
