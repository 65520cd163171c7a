"""Which teacher layers each student layer learns from, if the two models have different depths.

    pairs = layer_map("uniform_consecutive", student=2, teacher=4)     # [(0, 0), (0, 1), (1, 2), (1, 3)]
    pairs = layer_map("0:1,1:3", student=2, teacher=4)                 # [(0, 1), (1, 3)]

A pair is (student layer, teacher layer), counted from 0. A layer means the output of that block, so the
embeddings are not a layer, and the last layer is the hidden state before the final norm. The strategies are
those that arXiv 2310.08797 compares; tools/search_layers.py looks for pairs. Left out: maps that are learned,
such as the earth mover's distance between layers (arXiv 2010.06133).
"""

from configurator import UserError

STRATEGIES = ("last", "last_k_uniform", "all", "uniform_consecutive", "uniform_plus_last")


def explicit_pairs(text: str) -> list[tuple[int, int]]:
    """"0:1,1:3" -> [(0, 1), (1, 3)], [] for the name of a strategy. Raises UserError for anything else."""
    if text in STRATEGIES:
        return []
    try:
        pairs = [tuple(map(int, pair.split(":"))) for pair in text.split(",")]
        return sorted({(student, teacher) for student, teacher in pairs})
    except ValueError:
        raise UserError(f"layer_map={text}: write pairs student:teacher such as 0:1,1:3, or one of "
                        f"{', '.join(STRATEGIES)}") from None


def layer_map(strategy: str, student: int, teacher: int) -> list[tuple[int, int]]:
    """The sorted pairs (student layer, teacher layer) of a strategy, or those that are written out.

    student, teacher: depths, in blocks.

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
    if pairs := explicit_pairs(strategy):
        if not all(0 <= s < student and 0 <= t < teacher for s, t in pairs):
            raise UserError(f"layer_map={strategy}: the student has layers 0 to {student - 1}, the teacher 0 "
                            f"to {teacher - 1}")
        return pairs
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
    last = {(i, teacher - student + i) for i in range(student)}  # for "all", teacher == student
    if strategy == "uniform_plus_last":
        last |= {(i, borders[i + 1] - 1) for i in range(student)}
    return sorted(last)
