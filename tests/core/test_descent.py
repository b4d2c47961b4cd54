"""Truncation that the step's own descent pays for."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt

from .cases import Case, assert_close, cases, keep_all, quadratic, step


@given(data=st.data(), theta=st.floats(0.01, 0.99), allowance=st.floats(0.0, 3.0))
def test_the_error_is_within_the_share_and_no_rank_is_wasted(data, theta, allowance):
    order = data.draw(st.integers(1, 4))
    values = [
        np.array(sorted(data.draw(st.lists(st.floats(0.0, 2.0), min_size=1, max_size=6)))[::-1])
        for _ in range(order)
    ]
    spectrum = gt.Spectrum((9,) * order, tuple(values), facts=gt.Facts(allowance=allowance))
    (ranks,) = gt.DescentSafe(theta)([spectrum])
    tails = [np.linalg.norm(s[rank:]) for s, rank in zip(values, ranks, strict=True)]
    assert math.hypot(*tails) <= theta * allowance * (1 + 1e-12)
    for s, rank in zip(values, ranks, strict=True):
        assert 1 <= rank <= len(s)
        if rank > 1:
            assert np.linalg.norm(s[rank - 1 :]) >= theta * allowance / math.sqrt(order) * (
                1 - 1e-12
            )


def test_floor_and_cap():
    values = np.array([8.0, 4.0, 2.0, 1.0])
    spectrum = gt.Spectrum((9, 9), (values, values[:2]), facts=gt.Facts(allowance=6.0))
    assert gt.DescentSafe()([spectrum]) == [(3, 2)]
    assert gt.DescentSafe(floor=4)([spectrum]) == [(4, 2)]
    assert gt.DescentSafe(cap=1)([spectrum]) == [(1, 1)]


class Recorder:
    """Keeps every rank and what it was told."""

    def __init__(self):
        self.seen = []

    def __call__(self, spectra):
        self.seen.extend(spectra)
        return keep_all(spectra)


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Tangent, gt.Standard])
@given(data=st.data())
def test_integrators_supply_what_they_know(backend, data, integrator):
    case = data.draw(cases(backend))
    objective, _ = quadratic(case, case.normal(*case.shape, stream=42))
    point, recorder = case.point(), Recorder()
    result = step(integrator(0.3), point, objective, recorder)
    (spectrum,) = recorder.seen
    assert spectrum.facts.previous == point.ranks
    assert spectrum.itemsize == {"float32": 4, "float64": 8}[case.dtype]
    # Euler's step is -lr G in the wide bases, so -<G, S> / ||G|| is its length.
    moved = np.linalg.norm(case.dense(result.point) - case.dense(point))
    assert spectrum.facts.allowance == pytest.approx(moved, rel=case.tol, abs=case.tol)


def test_a_step_uphill_and_a_gradient_of_zero_allow_nothing(backend):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    objective, gradient = quadratic(case, case.normal(5, 3, 4, stream=42))
    integrator, point = gt.TDLRT(0.1, gt.HeavyBall(0.9)), case.point()
    against = gt.project(point, case.array(-1e3 * gradient(case.dense(point))))
    uphill = gt.State(1, (against,))
    allowances = []
    for state in (integrator.init(point), uphill):
        recorder = Recorder()
        step(integrator, point, objective, recorder, state)
        allowances.append(recorder.seen[0].facts.allowance)
    assert allowances[0] > 0.0
    assert allowances[1] == 0.0
    recorder = Recorder()
    step(gt.TDLRT(0.1), point, lambda w: (0.0, case.array(np.zeros((5, 3, 4)))), recorder)
    assert recorder.seen[0].facts.allowance == 0.0


def losses_of(seed, rule, integrator, shape=(5, 4, 6), near=False, steps=40):
    """Descend to a tensor with decaying singular values; return all losses, count truncations."""
    case = Case(NUMPY, "float64", shape, (2,) * len(shape), seed)
    decay = np.ix_(*(2.0 ** -np.arange(n) for n in shape))
    target = case.normal(*shape, stream=42) * math.prod(decay)
    weights = 0.2 + 0.8 * np.random.default_rng(5).random(shape)  # at most 1: L is 1-smooth
    objective, _ = quadratic(case, target, weights)
    start = gt.hosvd(0.9 * target, max(shape)) if near else case.point()
    result = gt.minimize(objective, start, integrator=integrator, ranks=rule, steps=steps)
    cuts = sum(report.error_bound > 1e-6 for report in result.history)
    return [report.loss for report in result.history] + [result.loss], cuts


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Standard, gt.Tangent])
@pytest.mark.parametrize("theta", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(6, 5), (5, 4, 6)])
def test_the_loss_never_rises(integrator, theta, shape):
    # The second-order part is paid for, too. (Tangent knows a part of the gradient only.)
    lr = 1.9 / (1 + theta)
    if integrator is gt.Tangent:
        lr = min(0.5, lr * (1 - theta) / (1 + theta))
    total = 0
    for seed, near in itertools.product(range(3), (True, False)):
        rule = gt.DescentSafe(theta)
        losses, cuts = losses_of(seed, rule, integrator(lr), shape, near)
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))
        total += cuts
    assert total > 5  # it does truncate


@pytest.mark.parametrize("rule", [gt.Tolerance(0.3), gt.Fixed(2)])
def test_a_coarse_rule_lets_the_loss_rise(rule):
    losses, _ = losses_of(0, rule, gt.TDLRT(0.1), near=True)
    assert any(b > a * (1 + 1e-6) for a, b in itertools.pairwise(losses))


class NUMPY:
    """All that a case needs where the array library does not matter."""

    name = "numpy"
    array = staticmethod(lambda values, dtype=None: np.array(values, dtype))
    numpy = staticmethod(np.array)


def test_ranks_follow_the_descent():
    """A target of ranks 3 is found, and the noise of the last steps is not kept."""
    case = Case(NUMPY, "float64", (8, 7, 6), (1, 1, 1), 0)
    target = case.dense(case.point(1, (3, 3, 3)))
    objective, _ = quadratic(case, target)
    result = gt.minimize(
        objective, case.point(), integrator=gt.TDLRT(0.3), ranks=gt.DescentSafe(0.3), steps=40
    )
    assert_close(case.dense(result.point), target, 1e-4)
    assert max(result.point.ranks) <= 4


SPECTRUM = gt.Spectrum((5, 4), (np.ones(2), np.ones(2)))

ERRORS = {
    "theta 0": (lambda: gt.DescentSafe(0.0), "theta: expected a number in (0, 1), got 0.0"),
    "theta 1": (lambda: gt.DescentSafe(1.0), "theta: expected a number in (0, 1)"),
    "theta nan": (lambda: gt.DescentSafe(np.nan), "theta: expected a number in (0, 1)"),
    "floor": (lambda: gt.DescentSafe(floor=0), "floor: expected a positive integer"),
    "cap": (lambda: gt.DescentSafe(floor=3, cap=2), "at least floor = 3, got 2"),
    "none": (
        lambda: gt.DescentSafe()([SPECTRUM]),
        "DescentSafe needs the allowance of the step, got none for tensor 0 of shape (5, 4)",
    ),
    "hosvd": (lambda: gt.hosvd(np.eye(3), gt.DescentSafe()), "use Tolerance"),
    "nan": (
        lambda: gt.DescentSafe()([SPECTRUM._replace(facts=gt.Facts(allowance=math.nan))]),
        "allowance: expected a finite number of at least 0, got nan for tensor 0",
    ),
    "negative": (
        lambda: gt.DescentSafe()([SPECTRUM._replace(facts=gt.Facts(allowance=-1.0))]),
        "allowance: expected a finite number of at least 0, got -1.0",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_settings_and_facts_that_cannot_be_used(what):
    call, message = ERRORS[what]
    with pytest.raises(gt.RankError, match=re.escape(message)):
        call()
