"""Which teacher layers each student layer learns from, when the two models differ in depth.

    pairs = layer_map("uniform_consecutive", student=2, teacher=4)     # [(0, 0), (0, 1), (1, 2), (1, 3)]
    print(map_text(pairs))

A pair is (student layer, teacher layer), counted from 0; a layer stands for the output of that block, so the
embeddings are no layer and the last one comes before the final norm. The strategies follow arXiv 2310.08797,
which compares them. Left out: maps that are learned, such as the earth mover's distance between layers
(arXiv 2010.06133).
"""

from itertools import groupby
from typing import Literal

from configurator import UserError

Strategy = Literal["last", "last_k_uniform", "all", "uniform_consecutive", "uniform_plus_last"]


def layer_map(strategy: Strategy, student: int, teacher: int) -> list[tuple[int, int]]:
    """The pairs (student layer, teacher layer) of a strategy, in order of both.

    student, teacher: the depths, in blocks. The pairs of each strategy:
    last                 the last student layer <- the last teacher layer, and no other; any two depths.
    all                  layer i <- layer i; needs equal depths.
    last_k_uniform       the student's layers <- as many of the teacher's last, in turn.
    uniform_plus_last    those, and each student layer <- the last of its equal share of the teacher.
    uniform_consecutive  every student layer <- a block of neighbours, as equal as the depths allow; each
                         teacher layer stands in one block.
    Raises UserError for depths that the strategy cannot join.
    """
    if strategy == "last":
        return [(student - 1, teacher - 1)]
    depths = f"the student has {student} layers, the teacher {teacher}"
    if strategy == "all" and student != teacher:
        raise UserError(f"layer_map=all: needs equal depths, but {depths} (uniform_plus_last does not)")
    if student > teacher:
        raise UserError(f"layer_map={strategy}: needs a teacher as deep, but {depths} (last does not)")
    # Blocks of ceil(teacher / student) each would leave the last student layers with none: 5 <- 6, say.
    borders = [i * teacher // student for i in range(student + 1)]
    if strategy == "uniform_consecutive":
        return [(i, j) for i in range(student) for j in range(borders[i], borders[i + 1])]
    pairs = {(i, teacher - student + i) for i in range(student)}
    if strategy == "uniform_plus_last":
        pairs |= {(i, borders[i + 1] - 1) for i in range(student)}
    return sorted(pairs)


def map_text(pairs: list[tuple[int, int]]) -> str:
    """The map as a table to print, a line for each student layer that learns: "student 0  <- teacher 0 1"."""
    width = max(len(str(layer)) for pair in pairs for layer in pair)
    lines = []
    for layer, group in groupby(pairs, key=lambda pair: pair[0]):
        targets = " ".join(f"{target:>{width}}" for _, target in group)
        lines.append(f"student {layer:>{width}}  <- teacher {targets}")
    return "\n".join(lines)
