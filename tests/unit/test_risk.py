"""Which policies are tested, in which order, and where testing stops."""

from qs_jax.evaluation.risk import Estimate, accepted, ladder, pareto_path, rungs


def test_the_path_is_the_front_from_safe_to_cheap() -> None:
    estimates = [Estimate(n, risk, cost) for n, (risk, cost) in enumerate([(0.3, 5), (0.1, 9), (0.2, 9), (0.9, 1)])]
    assert [e.place for e in pareto_path(estimates)] == [1, 0, 3]
    assert [e.place for e in rungs(pareto_path(estimates), 0.5, (0.1, 0.3, 0.5, 1))] == [1, 0]
    many = [Estimate(n, n / 10, -n) for n in range(20)]
    assert [e.place for e in rungs(many, 1.0, (0.25, 0.5, 1))] == [2, 5, 10]


def test_a_lucky_bold_candidate_does_not_hide_the_timid_ones() -> None:
    costs = [100.0, 90.0, 91.0, 70.0, 50.0, 10.0]
    risks = [0.0, 0.03, 0.02, 0.1, -0.01, 0.9]
    estimates = [Estimate(n, risk, cost) for n, (risk, cost) in enumerate(zip(risks, costs, strict=True))]
    assert [e.place for e in ladder(estimates, 0.2, 100.0, 5)] == [2, 3, 4]
    assert ladder(estimates[:1], 0.2, 100.0, 5) == []


def test_a_bold_step_does_not_hide_a_later_one_that_risks_less() -> None:
    estimates = [Estimate(0, 0.02, 0.9), Estimate(1, 0.18, 0.7), Estimate(2, 0.05, 0.5), Estimate(3, 0.19, 0.4)]
    assert [estimate.place for estimate in ladder(estimates, 0.2, 1.0, 12)] == [0, 2, 3]


def test_testing_stops_at_the_first_failure() -> None:
    asked: list[float] = []
    assert accepted([0.01, 0.04, 0.2, 0.0], lambda p: asked.append(p) or p, 0.1) == [0.01, 0.04]
    assert asked == [0.01, 0.04, 0.2]
