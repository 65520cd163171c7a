"""Which teacher layers each student layer learns from, if the two models have different depths.

    pairs = layer_map("uniform_consecutive", student=2, teacher=4)     # [(0, 0), (0, 1), (1, 2), (1, 3)]
    print(map_text(pairs))

A pair is (student layer, teacher layer), counted from 0. A layer means the output of that block, so the
embeddings are not a layer, and the last layer is the hidden state before the final norm. The strategies are
those that arXiv 2310.08797 compares. Left out: maps that are learned, such as the earth mover's distance
between layers (arXiv 2010.06133).
"""

from itertools import groupby
from typing import Literal

from configurator import UserError

Strategy = Literal["last", "last_k_uniform", "all", "uniform_consecutive", "uniform_plus_last"]


def layer_map(strategy: Strategy, student: int, teacher: int) -> list[tuple[int, int]]:
    """The sorted pairs (student layer, teacher layer) of a strategy. student, teacher: depths, in blocks.

    last                 The last student layer learns from the last teacher layer, for any two depths.
    all                  Layer i learns from layer i; the depths must be equal.
    last_k_uniform       The student's k layers learn from the teacher's last k layers, one from each.
    uniform_consecutive  The teacher is cut into k blocks of neighbouring layers, as equal as possible; each
                         student layer learns from all layers of its block.
    uniform_plus_last    The pairs of last_k_uniform, and each student layer with the last layer of its block.

    Example, student of 2 layers and teacher of 4: last_k_uniform is 0-2 1-3, uniform_consecutive is
    0-0 0-1 1-2 1-3, uniform_plus_last is 0-1 0-2 1-3.

    Raises UserError if the strategy does not allow the depths.
    """
    if strategy == "last":
        return [(student - 1, teacher - 1)]
    depths = f"the student has {student} layers, the teacher {teacher}"
    if strategy == "all" and student != teacher:
        raise UserError(f"layer_map=all: needs equal depths, but {depths}; use layer_map=uniform_plus_last")
    if student > teacher:
        raise UserError(f"layer_map={strategy}: the student is deeper than the teacher: {depths}; "
                        "use layer_map=last")
    # Blocks of ceil(teacher / student) layers would leave none for the last student layers, as with 5 and 6.
    borders = [i * teacher // student for i in range(student + 1)]
    if strategy == "uniform_consecutive":
        return [(i, j) for i in range(student) for j in range(borders[i], borders[i + 1])]
    pairs = {(i, teacher - student + i) for i in range(student)}  # for "all", teacher == student
    if strategy == "uniform_plus_last":
        pairs |= {(i, borders[i + 1] - 1) for i in range(student)}
    return sorted(pairs)


def map_text(pairs: list[tuple[int, int]]) -> str:
    """The map as text, one line per student layer: "student 0  <- teacher 0 1"."""
    width = max(len(str(layer)) for pair in pairs for layer in pair)
    lines = []
    for layer, group in groupby(pairs, key=lambda pair: pair[0]):
        targets = " ".join(f"{target:>{width}}" for _, target in group)
        lines.append(f"student {layer:>{width}}  <- teacher {targets}")
    return "\n".join(lines)
