"""Layer maps: worked examples, and properties that hold for every pair of depths up to 13."""

import pytest

from configurator import UserError
from distillation.layer_maps import layer_map

DEPTHS = [(student, teacher) for teacher in range(1, 14) for student in range(1, teacher + 1)]


@pytest.mark.parametrize("strategy, student, teacher, pairs", [
    ("last", 3, 5, [(2, 4)]),
    ("last", 5, 3, [(4, 2)]),
    ("all", 3, 3, [(0, 0), (1, 1), (2, 2)]),
    ("last_k_uniform", 3, 12, [(0, 9), (1, 10), (2, 11)]),
    ("uniform_plus_last", 3, 12, [(0, 3), (0, 9), (1, 7), (1, 10), (2, 11)]),
    ("uniform_plus_last", 3, 8, [(0, 1), (0, 5), (1, 4), (1, 6), (2, 7)]),
    ("uniform_plus_last", 2, 3, [(0, 0), (0, 1), (1, 2)]),
    ("uniform_consecutive", 2, 4, [(0, 0), (0, 1), (1, 2), (1, 3)]),
    ("uniform_consecutive", 2, 5, [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4)]),
    ("uniform_consecutive", 5, 6, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (4, 5)]),
])
def test_by_hand(strategy, student, teacher, pairs):
    assert layer_map(strategy, student, teacher) == pairs


@pytest.mark.parametrize("strategy", ["last_k_uniform", "uniform_plus_last", "uniform_consecutive"])
def test_every_student_layer_has_targets_in_order(strategy):
    for student, teacher in DEPTHS:
        pairs = layer_map(strategy, student, teacher)
        assert sorted({i for i, _ in pairs}) == list(range(student))
        assert pairs == sorted(set(pairs)) and pairs[-1] == (student - 1, teacher - 1)
        assert all(0 <= j < teacher for _, j in pairs)


def test_uniform_consecutive_uses_every_teacher_layer_once_in_even_blocks():
    for student, teacher in DEPTHS:
        pairs = layer_map("uniform_consecutive", student, teacher)
        assert [j for _, j in pairs] == list(range(teacher))
        sizes = [sum(i == layer for i, _ in pairs) for layer in range(student)]
        assert max(sizes) - min(sizes) <= 1


def test_all_is_the_identity_or_refuses():
    for student, teacher in DEPTHS:
        if student == teacher:
            assert layer_map("all", student, teacher) == [(i, i) for i in range(student)]
        else:
            with pytest.raises(UserError, match=f"{student} layers, the teacher {teacher};"):
                layer_map("all", student, teacher)


@pytest.mark.parametrize("strategy", ["last_k_uniform", "all", "uniform_consecutive", "uniform_plus_last"])
def test_a_deeper_student_is_refused_with_both_depths(strategy):
    with pytest.raises(UserError, match="6 layers, the teacher 4;"):
        layer_map(strategy, 6, 4)


def test_pairs_are_written_out():
    assert layer_map("1:3,0:1", 2, 4) == [(0, 1), (1, 3)]
    assert layer_map("0:1,0:1,1:0", 2, 4) == [(0, 1), (1, 0)], "any order, each pair once"
    for text in ("0:4", "2:0", "-1:0"):
        with pytest.raises(UserError, match="the student has layers 0 to 1, the teacher 0 to 3"):
            layer_map(text, 2, 4)
    for text in ("", "0", "0:1:2", "a:b", "0:1,", "lasts"):
        with pytest.raises(UserError, match="write pairs student:teacher such as 0:1,1:3, or one of last, "):
            layer_map(text, 2, 4)
