"""Draw the curves of one or more runs: loss, learning rate and speed against the step.

    python -m tools.plot out/base                          # writes out/base/curves.png
    python -m tools.plot out/base out/more --out=both.png  # several runs in one picture

Reads metrics.jsonl of each run. Needs matplotlib.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configurator import UserError, configure, run_script
from formats.files import read_jsonl


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    out: str | None = None  # the picture's file; None writes curves.png into the first run's folder


def curve(events: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps and values of the events that have `key`."""
    points = [(event["step"], event[key]) for event in events if key in event and "step" in event]
    return [step for step, _ in points], [value for _, value in points]


def draw(runs: dict[str, list[dict[str, Any]]]) -> Any:
    """A matplotlib Figure with three panels. runs: {name: the events of its metrics.jsonl}."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("tools.plot needs matplotlib (pip install matplotlib)") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    loss, rate, speed = (figure.add_subplot(place) for place in (grid[:, :2], grid[0, 2], grid[1, 2]))
    for number, (name, events) in enumerate(runs.items()):
        color = f"C{number}"
        steps, values = curve(events, "loss")
        loss.plot(steps, values, color=color, alpha=0.5, linewidth=1, label=f"{name}: training")
        steps, values = curve(events, "val_loss")
        loss.plot(steps, values, color=color, marker="o", label=f"{name}: validation")
        rate.plot(*curve(events, "lr"), color=color)
        speed.plot(*curve(events, "tokens_per_second"), color=color)
    loss.set(xlabel="step", ylabel="loss (nats per token)")
    loss.legend()
    rate.set(ylabel="learning rate", ylim=(0, None))
    speed.set(xlabel="step", ylabel="tokens per second", ylim=(0, None))
    for axes in (loss, rate, speed):
        axes.grid(alpha=0.3)
    return figure


def main(argv: list[str]) -> int:
    # Arguments without -- are run folders here, not config files.
    cfg, _ = configure(PlotConfig, [arg for arg in argv if arg.startswith("-")], usage=__doc__)
    folders = [Path(arg) for arg in argv if not arg.startswith("-")]
    if not folders:
        raise UserError("name a run folder: python -m tools.plot out/base")
    runs = {str(folder): read_jsonl(folder / "metrics.jsonl") for folder in folders}
    for name, events in runs.items():
        if not any("loss" in event or "val_loss" in event for event in events):
            raise UserError(f"{name}: no run here (no losses in its metrics.jsonl)")
    path = Path(cfg.out) if cfg.out else folders[0] / "curves.png"
    draw(runs).savefig(path, dpi=110)
    print(f"curves    {path}")
    return 0


if __name__ == "__main__":
    run_script(main)
