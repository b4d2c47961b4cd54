"""Rank rules: NumPy on the host only, so no backend is needed."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import geotucker as gt
from geotucker._tensor import feasible

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=5).map(tuple)


def is_feasible(ranks, shape):
    return all(
        rank <= min(n, math.prod(ranks) // rank) for rank, n in zip(ranks, shape, strict=True)
    )


def size(ranks, shape):
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))


def descending(*values):
    return np.array(sorted(values, reverse=True))


@given(shape=SHAPES, data=st.data())
def test_feasible_gives_the_largest_feasible_ranks(shape, data):
    wanted = data.draw(st.tuples(*(st.integers(1, 9) for _ in shape)))
    got = feasible(wanted, shape)
    assert is_feasible(got, shape)
    assert all(g <= w for g, w in zip(got, wanted, strict=True))
    below = itertools.product(
        *(range(1, min(w, n) + 1) for w, n in zip(wanted, shape, strict=True))
    )
    candidates = [ranks for ranks in below if is_feasible(ranks, shape)]
    largest = tuple(max(ranks[i] for ranks in candidates) for i in range(len(shape)))
    assert got == largest


@given(shape=SHAPES, fraction=st.floats(0.01, 1.0))
def test_a_fraction_is_a_budget_of_parameters(shape, fraction):
    got = gt.Fixed(fraction).for_shape(shape)
    caps = [feasible([cap] * len(shape), shape) for cap in range(1, max(shape) + 1)]
    fitting = [ranks for ranks in caps if size(ranks, shape) <= fraction * math.prod(shape)]
    assert got == (fitting[-1] if fitting else caps[0])


def test_a_number_is_a_common_cap():
    assert gt.Fixed(10).for_shape((50, 20, 5, 5)) == (10, 10, 5, 5)
    assert gt.Fixed(0.25).for_shape((64, 64, 3, 3))[2:] == (3, 3)
    assert gt.Fixed((7, 6, 2, 1)).for_shape((50, 20, 5, 5)) == (7, 6, 2, 1)
    assert gt.Fixed(np.float16(0.1)).for_shape((99, 99, 99)) == (43, 43, 43)
    assert gt.Fixed(1.0).for_shape((4, 5)) == (1, 1)  # rank 2 takes 22 numbers, dense 20


@pytest.mark.parametrize(
    ("shorthand", "rule"),
    [
        (3, gt.Fixed(3)),
        (np.int64(3), gt.Fixed(3)),
        (0.5, gt.Fixed(0.5)),
        (np.float32(0.5), gt.Fixed(0.5)),
        ((2, 3), gt.Fixed((2, 3))),
        ([2, np.int32(3)], gt.Fixed((2, 3))),
    ],
)
def test_numbers_stand_for_fixed_ranks(shorthand, rule):
    assert gt.as_rule(shorthand) == rule
    tensor = np.random.default_rng(0).standard_normal((4, 5))
    assert gt.hosvd(tensor, shorthand).ranks == gt.hosvd(tensor, rule).ranks


def test_rules_pass_through():
    for rule in (gt.Fixed(2), gt.Tolerance(0.1), lambda spectra: [(1, 1)]):
        assert gt.as_rule(rule) is rule
        assert isinstance(rule, gt.RankRule)


@given(
    values=st.lists(st.floats(0.0, 1e3), min_size=1, max_size=8),
    tau=st.floats(0.0, 0.99),
    order=st.integers(1, 5),
)
def test_tolerance_cuts_the_longest_tail_that_is_allowed(values, tau, order):
    values = descending(*values)
    rank = gt.Tolerance(tau).mode_rank(values, 0, (9,) * order)
    allowed = tau * np.linalg.norm(values) / math.sqrt(order)
    assert 1 <= rank <= len(values)
    assert np.linalg.norm(values[rank:]) <= allowed * (1 + 1e-12)
    if rank > 1:
        assert np.linalg.norm(values[rank - 1 :]) >= allowed * (1 - 1e-12)


def test_floor_and_cap():
    values = descending(8.0, 4.0, 2.0, 1.0)
    for rule, expected in [
        (gt.Tolerance(0.0), 4),
        (gt.Tolerance(0.9), 1),
        (gt.Tolerance(0.9, floor=3), 3),
        (gt.Tolerance(0.9, floor=9), 4),
        (gt.Tolerance(0.0, cap=2), 2),
        (gt.Tolerance(0.0, cap=9), 4),
        (gt.Tolerance(0.9, floor=2, cap=2), 2),
        (gt.Tolerance(0.9, spare=2), 3),
        (gt.Tolerance(0.9, spare=9), 4),
        (gt.Tolerance(0.9, spare=2, cap=2), 2),
    ]:
        assert rule.mode_rank(values, 0, (9, 9)) == expected
    tensor = np.random.default_rng(0).standard_normal((5, 4, 3))
    assert gt.hosvd(tensor, gt.Tolerance(0.99, floor=2)).ranks == (2, 2, 2)
    assert gt.st_hosvd(tensor, gt.Tolerance(0.0, cap=3)).ranks == (3, 3, 3)


@given(
    values=st.lists(st.floats(0.0, 1e3), min_size=2, max_size=8),
    tau=st.floats(0.0, 0.99),
    hysteresis=st.floats(0.0, 0.99),
    data=st.data(),
)
def test_a_mode_shrinks_only_with_a_margin(values, tau, hysteresis, data):
    values, shape = descending(*values), (9, 9, 9)
    previous = data.draw(st.integers(1, len(values)))
    rule = gt.Tolerance(tau, hysteresis=hysteresis)
    without = rule.mode_rank(values, 1, shape)
    rank = rule.mode_rank(values, 1, shape, previous)
    allowed = tau * np.linalg.norm(values) / math.sqrt(3)
    assert np.linalg.norm(values[rank:]) <= allowed * (1 + 1e-12)  # the bound holds
    if without >= previous:
        assert rank == without
    else:
        assert without <= rank <= previous
        tails = [np.linalg.norm(values[r:]) for r in range(1, len(values) + 1)]
        if rank < previous:
            assert tails[rank - 1] <= (1 - hysteresis) * allowed * (1 + 1e-12)
        if rank > 1:
            assert tails[rank - 2] >= (1 - hysteresis) * allowed * (1 - 1e-12)


@example(values=[10.0, 1.0, 0.68, 0.3, 0.1], tau=0.1, spare=1, previous=4)
@given(
    values=st.lists(st.floats(0.0, 1e3), min_size=2, max_size=8),
    tau=st.floats(0.0, 0.99),
    spare=st.integers(0, 3),
    previous=st.integers(1, 8),
)
def test_hysteresis_alone_never_lets_a_mode_grow(values, tau, spare, previous):
    values, previous = descending(*values), min(previous, len(values))
    rule = gt.Tolerance(tau, hysteresis=0.9, spare=spare)
    without = rule.mode_rank(values, 1, (9, 9))
    assert without <= rule.mode_rank(values, 1, (9, 9), previous) <= max(without, previous)


def test_hysteresis_keeps_what_hovers_at_the_threshold():
    values = descending(10.0, 1.0, 0.68)  # 0.1 of the norm / sqrt(2) is 0.7128
    rule = gt.Tolerance(0.1, hysteresis=0.1)
    assert rule.mode_rank(values, 0, (9, 9)) == 2
    assert rule.mode_rank(values, 0, (9, 9), previous=2) == 2
    assert rule.mode_rank(values, 0, (9, 9), previous=3) == 3
    assert gt.Tolerance(0.1, hysteresis=0.02).mode_rank(values, 0, (9, 9), previous=3) == 2
    assert gt.Tolerance(0.2, hysteresis=0.99).mode_rank(values, 0, (9, 9), previous=2) == 2
    assert gt.Tolerance(0.1, cap=2, hysteresis=0.1).mode_rank(values, 0, (9, 9), previous=3) == 2
    point = gt.hosvd(np.diag(values), 3)
    for previous, expected in (((2, 2), 2), ((3, 3), 3)):
        (cut,) = gt.truncate([point], rule, [gt.Facts(previous=previous)])
        assert cut.point.ranks == (expected,) * 2


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_tolerance_knows_no_scale(scale):
    values = scale * descending(1.0, 0.5, 0.1, 1e-3)
    assert gt.Tolerance(0.05).mode_rank(values, 0, (9, 9)) == 3


def test_a_rule_sees_all_tensors_at_once():
    seen = []

    def most_to_the_largest(spectra):
        seen.extend(spectra)
        largest = max(range(len(spectra)), key=lambda i: spectra[i].values[0][0])
        return [(2, 2) if i == largest else (1, 1) for i in range(len(spectra))]

    points = [gt.testing.random_point((5, 4), (3, 3), seed=i) for i in range(3)]
    points[1] = gt.scale(points[1], 100.0)
    cuts = gt.truncate(points, most_to_the_largest)
    assert [cut.point.ranks for cut in cuts] == [(1, 1), (2, 2), (1, 1)]
    assert [spectrum.shape for spectrum in seen] == [(5, 4)] * 3
    singular = np.linalg.svd(points[1].core, compute_uv=False)
    np.testing.assert_allclose(seen[1].values[0], singular, rtol=1e-12)
    np.testing.assert_allclose(seen[1].values[1], singular, rtol=1e-12)


def test_a_rule_of_ones_own_decides_mode_by_mode():
    class Even(gt.ModeRule):
        def mode_rank(self, values, mode, shape, previous=None):
            return min(2 + 2 * (mode == 1), len(values))

    tensor = np.random.default_rng(0).standard_normal((5, 5, 5))
    assert gt.hosvd(tensor, Even()).ranks == (2, 4, 2)
    assert gt.st_hosvd(tensor, Even()).ranks == (2, 4, 2)
    with pytest.raises(NotImplementedError):
        gt.hosvd(tensor, gt.ModeRule())


class Zero(gt.ModeRule):
    def mode_rank(self, values, mode, shape, previous=None):
        return 0


TENSOR = np.random.default_rng(0).standard_normal((5, 4, 3))

ERRORS = {
    "tau 1": (lambda: gt.Tolerance(1.0), "tau: expected a number in [0, 1), got 1.0"),
    "tau < 0": (lambda: gt.Tolerance(-0.1), "tau: expected a number in [0, 1)"),
    "tau nan": (lambda: gt.Tolerance(np.nan), "tau: expected a number in [0, 1)"),
    "floor 0": (lambda: gt.Tolerance(0.1, floor=0), "floor: expected a positive"),
    "floor 1.5": (lambda: gt.Tolerance(0.1, floor=1.5), "floor: expected a positive"),
    "cap": (lambda: gt.Tolerance(0.1, 3, 2), "at least floor = 3, got 2"),
    "cap 2.5": (lambda: gt.Tolerance(0.1, cap=2.5), "cap: expected an integer"),
    "spare": (lambda: gt.Tolerance(0.1, spare=-1), "spare: expected zero or a positive"),
    "hysteresis": (lambda: gt.Tolerance(0.1, hysteresis=1.0), "hysteresis: expected a number in"),
    "previous ranks": (
        lambda: gt.truncate(
            [gt.hosvd(np.eye(3), 2)], gt.Tolerance(0.1, hysteresis=0.2), [gt.Facts(previous=(1,))]
        ),
        "facts.previous: expected 2 ranks for a tensor of shape (3, 3), got (1,)",
    ),
    "facts": (
        lambda: gt.truncate([gt.hosvd(TENSOR, 2)], gt.Fixed(1), []),
        "facts: expected one for each of 1 points, got 0",
    ),
    "rank 0": (lambda: gt.Fixed(0), "ranks: expected a positive integer"),
    "True": (lambda: gt.as_rule(True), "ranks: expected a positive integer"),
    "fraction 0": (lambda: gt.as_rule(0.0), "ranks: expected a fraction in (0, 1]"),
    "fraction 2": (lambda: gt.hosvd(TENSOR, 2.0), "expected a fraction in (0, 1]"),
    "fraction nan": (lambda: gt.Fixed(np.nan), "expected a fraction in (0, 1]"),
    "tuple of 0": (lambda: gt.hosvd(TENSOR, (2, 0, 1)), "expected positive integers"),
    "no ranks": (lambda: gt.Fixed(()), "ranks: expected positive integers, got ()"),
    "tuple of floats": (lambda: gt.as_rule([2.0]), "expected positive integers"),
    "two of three": (
        lambda: gt.hosvd(TENSOR, (2, 2)),
        "ranks: expected 3 positive integers for a tensor of shape (5, 4, 3), got (2, 2)",
    ),
    "a word": (lambda: gt.round(gt.hosvd(TENSOR, 2), "all"), "got 'all'"),
    "nothing": (lambda: gt.hosvd(TENSOR, None), "ranks: expected a rank rule"),
    "a class": (lambda: gt.hosvd(TENSOR, gt.Tolerance), "expected a rank rule"),
    "rule of 0": (lambda: gt.hosvd(TENSOR, Zero()), "from 1 to (5, 4, 3)"),
    "st rule of 0": (lambda: gt.st_hosvd(TENSOR, Zero()), "from 1 to 5 for mode 0"),
    "rule too high": (
        lambda: gt.hosvd(TENSOR, lambda spectra: [(6, 1, 1)]),
        "expected from 1 to (5, 4, 3) for a tensor of shape (5, 4, 3), got (6, 1, 1)",
    ),
    "rule too short": (
        lambda: gt.round(gt.hosvd(TENSOR, 2), lambda spectra: [(2, 2)]),
        "expected from 1 to (2, 2, 2)",
    ),
    "rule for none": (
        lambda: gt.truncate([gt.hosvd(TENSOR, 2)], lambda spectra: []),
        "gave ranks for 0 of 1 tensors",
    ),
    "all modes at once": (
        lambda: gt.st_hosvd(TENSOR, lambda spectra: [(1, 1, 1)]),
        "st_hosvd needs a rule that decides mode by mode",
    ),
    "random ranks": (
        lambda: gt.testing.random_point((2, 5), (3, 3)),
        "ranks: expected at most the shape (2, 5), got (3, 3)",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_ranks_that_cannot_be_used(what):
    call, message = ERRORS[what]
    with pytest.raises(gt.RankError, match=re.escape(message)):
        call()
