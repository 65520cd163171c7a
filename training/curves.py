"""The curves of training runs, as a picture and as text.

    redraw(run)                                # rewrites out_dir/loss.png; the loop calls it at evaluations
    figure = draw({"out/base": events})        # a matplotlib Figure with the curves of one or more runs
    print("\\n".join(text_curves(events)))      # a line of block characters per curve, for a terminal

The events are those of metrics.jsonl (training/run.py). tools/plot.py compares several runs in one picture.
"""

import io
import math
import sys
from typing import Any

from configurator import optional_import
from formats.files import write_bytes
from training.run import Run

BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-~=+*#"  # for a terminal that has no block characters
TEXT_WIDTH = 48  # characters of a text curve, at most


def curve(events: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps and values of the events that have `key`."""
    points = [(event["step"], event[key]) for event in events if key in event and "step" in event]
    return [step for step, _ in points], [value for _, value in points]


def draw(runs: dict[str, list[dict[str, Any]]]) -> Any:
    """A matplotlib Figure: loss, learning rate and speed against the step.

    runs: {name: the events of its metrics.jsonl}. Raises UserError if matplotlib is missing.
    """
    # Imported here, because that takes half a second; without pyplot, so that no window or memory stays.
    figure = optional_import("matplotlib.figure", "curves").Figure(figsize=(10, 4), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    loss, rate, speed = (figure.add_subplot(place) for place in (grid[:, :2], grid[0, 2], grid[1, 2]))
    for number, (name, events) in enumerate(runs.items()):
        color = f"C{number}"
        loss.plot(*curve(events, "loss"), color=color, alpha=0.5, linewidth=1, label=f"{name}: training")
        steps, values = curve(events, "val_loss")
        last = f" ({values[-1]:.4f})" if values else ""
        loss.plot(steps, values, color=color, marker="o", markersize=4, label=f"{name}: validation{last}")
        rate.plot(*curve(events, "lr"), color=color)
        speed.plot(*curve(events, "tokens_per_second"), color=color)
    loss.set(xlabel="step", ylabel="loss")
    loss.legend()
    rate.set(ylabel="learning rate", ylim=(0, None))
    speed.set(xlabel="step", ylabel="tokens per second", ylim=(0, None))
    for axes in (loss, rate, speed):
        axes.grid(alpha=0.3)
    return figure


def redraw(run: Run) -> None:
    """Rank 0 draws out_dir/loss.png again. A failure prints one line, and does not stop the run."""
    if run.rank > 0:
        return
    try:
        picture = io.BytesIO()
        draw({run.out_dir.name: run.events()}).savefig(picture, dpi=110, format="png")
        write_bytes(run.out_dir / "loss.png", picture.getvalue())
    except Exception as error:
        reason = " ".join(str(error).split())
        run.print(f"note      loss.png was not drawn ({type(error).__name__}: {reason})")


def text_curves(events: list[dict[str, Any]]) -> list[str]:
    """One line each for the training and the validation loss, on the same scale; [] without losses.

    Each character is the mean over a part of the steps, and blank if nothing was logged there.
    """
    points = {name: curve(events, key) for name, key in (("training", "loss"), ("validation", "val_loss"))}
    points = {name: (steps, values) for name, (steps, values) in points.items() if values}
    everything = [value for _, values in points.values() for value in values if math.isfinite(value)]
    if not everything:
        return []
    low, high = min(everything), max(everything)
    last = max(steps[-1] for steps, _ in points.values())
    width = min(TEXT_WIDTH, max(len(values) for _, values in points.values()))
    bars = BARS if "utf" in (sys.stdout.encoding or "").lower() else ASCII_BARS
    lines = []
    for name, (steps, values) in points.items():
        columns: list[list[float]] = [[] for _ in range(width)]
        for step, value in zip(steps, values, strict=True):
            if math.isfinite(value):  # the curve cannot show other values; the text does
                columns[max(step - 1, 0) * width // max(last, 1)].append(value)
        heights = [round((sum(c) / len(c) - low) / (high - low or 1) * (len(bars) - 1)) if c else None
                   for c in columns]
        line = "".join(" " if height is None else bars[height] for height in heights)
        lines.append(f"{name:10}  {line}  {values[0]:.4f} to {values[-1]:.4f}")
    return lines


def print_end(run: Run, *commands: str) -> None:
    """End a run's output: its loss curves, and the commands that make sense next, one per line."""
    if run.rank > 0:
        return
    if lines := text_curves(run.events()):
        run.print("curves      " + "\n            ".join([*lines, f"{run.out_dir / 'loss.png'}"]))
    run.print("\nnext        " + "\n            ".join(commands))
