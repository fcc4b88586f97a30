"""What free running measures, by its definitions."""

from qs_jax.evaluation.freerun import agreement, grams, variety


def test_free_running_is_measured_by_its_definitions() -> None:
    assert agreement([1, 2, 3], [1, 2, 4]) == 2
    assert agreement([1, 2], [1, 2]) == 2
    assert grams([1, 2, 3], 2) == [(1, 2), (2, 3)]
    assert variety([[1, 2, 3, 4, 5]]) == {"repetition": 0.0, "distinct_1": 1.0, "distinct_2": 1.0}
    assert variety([[7] * 8]) == {"repetition": 4 / 5, "distinct_1": 1 / 8, "distinct_2": 1 / 7}
