"""The budget over a network, against brute force, the linear relaxation and its own promises."""

import itertools
import math
import re
from fractions import Fraction
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt
from geotucker._ranks import _allocate, _budget, _knapsack

LENET = [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]
LARGE = [(64, 3, 3, 3), (64, 64, 3, 3), (96, 64, 3, 3), (128, 96, 3, 3), (256, 128), (10, 256)]


def is_feasible(ranks):
    return all(rank <= math.prod(ranks) // rank for rank in ranks)


def size(shape, ranks):
    return math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))


def attenuation(spectrum, ranks):
    """Return -log of the product of what the modes keep, by the definition."""
    pairs = [(s, r) for s, r in zip(spectrum.values, ranks, strict=True) if s[0] > 0]
    kept = [np.sum((s[:r] / s[0]) ** 2) / np.sum((s / s[0]) ** 2) for s, r in pairs]
    return -math.log(math.prod(kept))


class Choice(NamedTuple):
    ranks: tuple
    cost: int
    loss: float


def choices(spectrum, cost, floor=1, cap=99):
    counts = [len(values) for values in spectrum.values]
    box = [range(min(floor, c, cap), min(cap, c) + 1) for c in counts]
    found = [ranks for ranks in itertools.product(*box) if is_feasible(ranks)]
    return [Choice(ranks, cost(ranks), attenuation(spectrum, ranks)) for ranks in found]


def best(tables, budget, least=0):
    """Least attenuation within the budget, over all combinations; None if there is none."""
    sums = [(0, 0.0)]
    for table in tables:
        sums = [(a + c.cost, b + c.loss) for a, b in sums for c in table if a + c.cost <= budget]
    return min((loss for cost, loss in sums if cost >= least), default=None)


def total(spectra, ranks, costs):
    pairs = list(zip(spectra, ranks, costs, strict=True))
    return sum(cost(r) for _, r, cost in pairs), sum(attenuation(s, r) for s, r, _ in pairs)


SHAPES = st.sampled_from([(4, 5), (6, 3), (3, 3), (2, 3, 4), (3, 3, 2), (2, 2, 2), (5, 1, 4), (3,)])


@st.composite
def spectra(draw, shapes=SHAPES, max_size=3, zeros=True):
    """Two or three small tensors: steep, flat, with ties, with zeros, of any scale."""
    drawn = []
    for shape in draw(st.lists(shapes, min_size=1 if max_size == 1 else 2, max_size=max_size)):
        limits = [min(n, math.prod(shape) // n) for n in shape]
        rng = np.random.default_rng(draw(st.integers(0, 2**16)))
        decay, scale = draw(st.sampled_from([0.0, 0.5, 3.0])), draw(st.sampled_from([1e-200, 1.0]))
        values = []
        for limit in limits:
            noise = rng.random(limit) * draw(st.sampled_from([0.0, 1.0]))
            s = np.sort((0.1 + noise) * np.exp(-decay * np.arange(limit)))[::-1]
            if zeros and draw(st.integers(0, 5)) == 0:
                s = s * (np.arange(limit) < draw(st.integers(0, limit)))
            values.append(scale * s)
        if any(s[0] == 0 for s in values):
            values = [0.0 * s for s in values]
        drawn.append(gt.Spectrum(shape, tuple(values)))
    return drawn


def costs_of(problem):
    return [lambda ranks, shape=s.shape: size(shape, ranks) for s in problem]


@given(problem=spectra(), share=st.floats(0.0, 1.1), floor=st.integers(1, 2), data=st.data())
def test_small_networks_get_the_optimum(problem, share, floor, data):
    cap = data.draw(st.sampled_from([None, 2, 3]))
    costs = costs_of(problem)
    tables = [choices(s, cost, floor, cap or 99) for s, cost in zip(problem, costs, strict=True)]
    # A floor that no tensor of these other ranks has is lowered: (5, 1, 4) has ranks (r, 1, r).
    least, most = (sum(f(c.cost for c in table) for table in tables) for f in (min, max))
    budget = least + int(share * (most - least))
    ranks = gt.Budget(parameters=budget, floor=floor, cap=cap)(problem)
    cost, loss = total(problem, ranks, costs)
    assert cost <= budget
    assert all(ranks[k] in [choice.ranks for choice in table] for k, table in enumerate(tables))
    assert loss == pytest.approx(best(tables, budget), rel=1e-12, abs=1e-13)


@given(problem=spectra(), share=st.floats(0.0, 1.1), data=st.data())
def test_small_networks_get_the_optimum_for_their_sensitivities(problem, share, data):
    numbers = st.lists(st.floats(0.05, 20.0), min_size=len(problem), max_size=len(problem))
    sensitivities = data.draw(numbers)
    exponents = [number / np.mean(sensitivities) for number in sensitivities]
    costs = costs_of(problem)
    tables = [
        [choice._replace(loss=exponent * choice.loss) for choice in choices(s, cost)]
        for s, cost, exponent in zip(problem, costs, exponents, strict=True)
    ]
    least, most = (sum(f(c.cost for c in table) for table in tables) for f in (min, max))
    budget = least + int(share * (most - least))
    ranks = gt.Budget(parameters=budget)(with_sensitivities(problem, sensitivities))
    pairs = list(zip(problem, ranks, strict=True))
    loss = sum(e * attenuation(s, r) for e, (s, r) in zip(exponents, pairs, strict=True))
    assert sum(size(s.shape, r) for s, r in pairs) <= budget
    assert loss == pytest.approx(best(tables, budget), rel=1e-12, abs=1e-13)


def with_sensitivities(problem, sensitivities):
    pairs = zip(problem, sensitivities, strict=True)
    return [s._replace(facts=s.facts._replace(sensitivity=number)) for s, number in pairs]


@given(problem=spectra(), share=st.floats(0.1, 1.0), scale=st.floats(1e-100, 1e100))
def test_only_ratios_of_sensitivities_matter(problem, share, scale):
    rule = gt.Budget(parameters=share)
    dense = sum(math.prod(s.shape) for s in problem)
    if sum(size(s.shape, (1,) * len(s.shape)) for s in problem) > share * dense:
        return
    alike = [scale] * len(problem)
    assert rule(with_sensitivities(problem, alike)) == rule(problem)
    # What is not known counts as the mean of the others.
    assert rule(with_sensitivities(problem, [*alike[1:], None])) == rule(problem)
    assert rule(with_sensitivities(problem, [0.0] * len(problem))) == rule(problem)


@given(problem=spectra(), shares=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)))
def test_a_larger_budget_attenuates_less(problem, shares):
    costs = costs_of(problem)
    least = sum(cost((1,) * len(s.shape)) for s, cost in zip(problem, costs, strict=True))
    dense = 2 * sum(math.prod(s.shape) for s in problem)
    budgets = sorted(least + int(share * dense) for share in shares)
    losses = [total(problem, gt.Budget(parameters=budget)(problem), costs)[1] for budget in budgets]
    assert losses[0] >= losses[1] - 1e-12


@given(problem=spectra(), share=st.floats(0.0, 1.0))
def test_fractions_are_of_the_dense_tensors_and_used_to_one_per_cent(problem, share):
    costs = costs_of(problem)
    tables = [choices(s, cost) for s, cost in zip(problem, costs, strict=True)]
    dense = sum(math.prod(s.shape) for s in problem)
    least = sum(min(c.cost for c in table) for table in tables)
    fraction = math.nextafter(least / dense, 2.0) * (1.0 - share) + share
    if fraction > 1.0:
        return
    cost, loss = total(problem, gt.Budget(parameters=fraction)(problem), costs)
    assert cost <= fraction * dense
    optimum = best(tables, fraction * dense)
    used = best(tables, fraction * dense, 0.99 * fraction * dense)
    worst = optimum + 0.1 * min(optimum, 1.0)
    if cost >= 0.99 * fraction * dense:
        assert loss == pytest.approx(used, rel=1e-12, abs=1e-13)
        assert loss <= worst + 1e-12
    else:  # the optimum, as use of the rest would be a tenth worse, or nothing is left to keep
        assert loss == pytest.approx(optimum, abs=1e-12)
        assert used is None or optimum < 1e-12 or used >= worst - 1e-12


def test_the_rest_of_a_fraction_is_used_where_it_costs_little():
    shapes = [(8, 3, 3, 3), (10, 8, 3, 3), (20, 12)]
    problem, dense = network(shapes, 2.0), sum(math.prod(shape) for shape in shapes)
    used = {}
    for amount in (0.1, int(0.1 * dense)):
        ranks = gt.Budget(parameters=amount)(problem)
        used[amount] = total(problem, ranks, costs_of(problem))[0]
    assert used[amount] < 0.99 * 0.1 * dense  # an absolute budget is a limit only
    assert 0.99 * 0.1 * dense <= used[0.1] <= 0.1 * dense


@pytest.mark.parametrize(
    ("shapes", "decay", "fraction"),
    [([(4, 6), (2, 6, 4)], 3.0, 0.82), ([(3, 4, 5), (8, 7), (2, 3, 3)], 2.0, 0.64)],
    ids=["of the attenuation", "of what passes"],
)
def test_the_rest_of_a_fraction_is_left_where_its_use_costs_much(shapes, decay, fraction):
    problem = network(shapes, decay)
    dense = sum(math.prod(shape) for shape in shapes)
    tables = [choices(s, cost) for s, cost in zip(problem, costs_of(problem), strict=True)]
    loss = best(tables, fraction * dense)
    loss_by_use = best(tables, fraction * dense, 0.99 * fraction * dense)
    if loss < 1.0:
        assert 1.5 < loss_by_use / loss < 3.0
    else:  # half of the attenuation would allow it
        assert loss_by_use / loss < 1.5 < math.exp(loss_by_use - loss) < 2.0
    ranks = gt.Budget(parameters=fraction)(problem)
    assert total(problem, ranks, costs_of(problem))[1] == pytest.approx(loss)


@given(problem=spectra(max_size=2), sizes=st.tuples(*[st.sampled_from([2, 4, 8])] * 2))
def test_bytes_count_dtypes(problem, sizes):
    problem = [s._replace(itemsize=itemsize) for s, itemsize in zip(problem, sizes, strict=False)]
    costs = [lambda r, s=s: s.itemsize * size(s.shape, r) for s in problem]
    tables = [choices(s, cost) for s, cost in zip(problem, costs, strict=True)]
    budget = sum(min(c.cost for c in table) for table in tables) + 120
    cost, loss = total(problem, gt.Budget(bytes=budget)(problem), costs)
    assert cost <= budget
    assert loss == pytest.approx(best(tables, budget), rel=1e-12, abs=1e-13)


def test_itemsize_is_that_of_the_arrays(backend):
    dense = np.random.default_rng(0).standard_normal((6, 5))
    points = [gt.hosvd(backend.array(dense, dtype), 5) for dtype in ("float64", "float32")]
    budget = gt.Budget(bytes=8 * size((6, 5), (2, 2)) + 4 * size((6, 5), (4, 4)))
    seen = []
    cuts = gt.truncate(points, lambda spectra: seen.extend(spectra) or budget(spectra))
    assert [spectrum.itemsize for spectrum in seen] == [8, 4]
    assert [cut.point.ranks for cut in cuts] == [(2, 2), (4, 4)]
    assert gt.hosvd(backend.array(dense, "float32"), gt.Budget(bytes=4 * 80)).ranks == (5, 5)


def polynomial(shape):
    return lambda ranks: 3 * math.prod(ranks) + size([n * n for n in shape], ranks)


def piecewise(shape):
    """Return a cost of single ranks only: the cheaper of two ways to contract."""
    return lambda ranks: min(2 * size(shape, ranks), 10 + math.prod(ranks) * max(ranks))


def misleading(shape):
    """Return a cost that takes arrays of ranks and means something else by them."""
    return lambda ranks: size(shape, ranks) + int(np.max(ranks))


@pytest.mark.parametrize("kind", [polynomial, piecewise, misleading])
@given(problem=spectra(), share=st.floats(0.0, 1.0))
def test_operations_are_the_callers(kind, problem, share):
    costs = [kind(s.shape) for s in problem]
    problem = [
        s._replace(facts=gt.Facts(flops=gt.Cost(cost, 100 * math.prod(s.shape))))
        for s, cost in zip(problem, costs, strict=True)
    ]
    tables = [choices(s, cost) for s, cost in zip(problem, costs, strict=True)]
    least, most = (sum(f(c.cost for c in table) for table in tables) for f in (min, max))
    budget = least + int(share * (most - least))
    cost, loss = total(problem, gt.Budget(flops=budget)(problem), costs)
    assert cost <= budget
    assert loss == pytest.approx(best(tables, budget), rel=1e-12, abs=1e-13)
    dense = sum(100 * math.prod(s.shape) for s in problem)
    if budget < dense:
        fraction = math.nextafter(budget / dense, 2.0)
        cost, of_fraction = total(problem, gt.Budget(flops=fraction)(problem), costs)
        assert cost <= fraction * dense
        assert of_fraction <= loss + 0.5 * min(loss, 1.0) + 1e-12


def test_a_cost_is_asked_for_many_ranks_at_a_time():
    calls = []

    def cost(ranks):
        calls.append(ranks)
        return math.prod(ranks)

    tensor = np.random.default_rng(0).standard_normal((12, 11, 10))
    rule = gt.Budget(flops=200)
    point = gt.hosvd(tensor, 12)
    (cut,) = gt.truncate([point], rule, [gt.Facts(flops=gt.Cost(cost, 1320))])
    assert math.prod(cut.point.ranks) <= 200
    assert len(calls) < 30


# The solver


def tensors(problem):
    """Return the solver's own form of a problem, built by `Budget`."""
    seen = []

    def allocate(tensors, budget, aim):
        seen.extend(tensors)
        return solve(tensors, budget, aim)

    solve = _allocate.allocate
    with patch("geotucker._ranks._budget.allocate", allocate):
        gt.Budget(parameters=10**12)(problem)
    return seen


def relaxation(tables, budget):
    """Attenuation of the linear relaxation, and the largest step along a hull."""
    steps, cost, loss = [], 0, 0.0
    for table in tables:
        points = sorted((c.cost, c.loss) for c in table)
        hull = [points[0]]
        while True:
            here = hull[-1]
            after = [p for p in points if p[0] > here[0] and p[1] < here[1] - 1e-14]
            if not after:
                break
            hull.append(min(after, key=lambda p: ((p[1] - here[1]) / (p[0] - here[0]), -p[0])))
        cost, loss = cost + hull[0][0], loss + hull[0][1]
        steps += [(q[0] - p[0], q[1] - p[1]) for p, q in itertools.pairwise(hull)]
    for width, height in sorted(steps, key=lambda s: s[1] / s[0]):
        share = min(1.0, (budget - cost) / width)
        cost, loss = cost + share * width, loss + share * height
        if share < 1.0:
            break
    return loss, max((-height for _, height in steps), default=0.0)


@given(problem=spectra(zeros=False), share=st.floats(0.0, 1.0), most=st.sampled_from([0, 2**12]))
def test_the_bound_is_the_relaxation_and_greedy_is_one_step_off(problem, share, most):
    costs = costs_of(problem)
    tables = [choices(s, cost) for s, cost in zip(problem, costs, strict=True)]
    least, largest = (sum(f(c.cost for c in table) for table in tables) for f in (min, max))
    budget = least + int(share * (largest - least))
    with patch.object(_knapsack, "LIST", most):  # 0: hardly anything beyond the greedy choice
        found = _allocate.allocate(tensors(problem), budget)
    bound, step = relaxation(tables, budget)
    assert found.bound == pytest.approx(bound, rel=1e-9, abs=1e-9)
    assert found.cost <= budget
    assert found.bound - 1e-12 <= found.attenuation <= found.bound + step + 1e-9
    cost, loss = total(problem, found.ranks, costs)
    assert (found.cost, found.attenuation) == (cost, pytest.approx(loss, abs=1e-9))


def distance(tensors):
    """Return the attenuation by which the first grids may miss the optimum."""
    grids = [points for tensor in tensors for points in _allocate._first_grid(tensor)]
    ratios = [max([1.0] + [(b - 1) / a for a, b in itertools.pairwise(g)]) for g in grids]
    return 2.0 * sum(math.log(ratio) for ratio in ratios)


@given(
    problem=spectra(st.sampled_from([(9, 8), (7, 6, 5), (4, 12, 3)]), 2, zeros=False),
    share=st.floats(0.0, 1.0),
    rounds=st.sampled_from([0, 12]),
)
def test_grids_come_as_close_as_they_promise(problem, share, rounds):
    costs = costs_of(problem)
    tables = [choices(s, cost) for s, cost in zip(problem, costs, strict=True)]
    least, most = (sum(f(c.cost for c in table) for table in tables) for f in (min, max))
    budget = least + int(share * (most - least) / 2)
    forms = tensors(problem)
    with patch.multiple(_allocate, BOX=1, GRID=10, ROUNDS=rounds, NEAR=1):
        found = _allocate.allocate(forms, budget)
        most = distance(forms)
    cost, loss = total(problem, found.ranks, costs)
    assert cost == found.cost <= budget
    assert all(is_feasible(ranks) for ranks in found.ranks)
    assert loss <= best(tables, budget) + most + 1e-9


def network(shapes, decay, seed=0):
    rng = np.random.default_rng(seed)
    spectra = []
    for shape in shapes:
        counts = [min(n, math.prod(shape) // n) for n in shape]
        values = [np.exp(-decay * np.arange(c) / c) + 0.1 * rng.random(c) for c in counts]
        spectra.append(gt.Spectrum(shape, tuple(np.sort(v)[::-1] for v in values)))
    return spectra


@pytest.mark.parametrize("decay", [0.0, 2.0, 20.0])
@pytest.mark.parametrize("fraction", [0.03, 0.3])
def test_large_networks_come_close_to_the_bound(decay, fraction):
    problem = network(LARGE, decay)
    forms, budget = tensors(problem), fraction * sum(math.prod(shape) for shape in LARGE)
    assert any(math.prod(t.upper) > _allocate.BOX for t in forms)  # a grid is needed
    modes = sum(len(shape) for shape in LARGE)
    assert distance(forms) / modes < 0.2
    with patch.object(_allocate, "BOX", 10**9):
        bound = _allocate.allocate(forms, budget).bound
    found = _allocate.allocate(forms, budget)
    # Refinement makes it far less in fact.
    assert bound - 1e-12 <= found.attenuation <= 1.003 * bound + 1e-12


@pytest.mark.parametrize("shapes", [LENET, LARGE], ids=["lenet5", "large"])
@pytest.mark.parametrize("decay", [0.0, 2.0, 20.0])
@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.2])
def test_the_budget_is_used_to_one_per_cent(shapes, decay, fraction):
    problem = network(shapes, decay)
    ranks = gt.Budget(parameters=fraction)(problem)
    used = sum(size(shape, r) for shape, r in zip(shapes, ranks, strict=True))
    budget = fraction * sum(math.prod(shape) for shape in shapes)
    assert 0.99 * budget <= used <= budget


def test_nothing_fills_a_budget_where_all_that_is_within_it_loses_too_much():
    # as it happens where the best ranks are those of an earlier grid
    table = _knapsack.Options(np.array([[1, 2]]), np.array([3, 5]), np.array([2.0, 1.0]))
    assert _knapsack.fill([table, table], budget=10, least=9, price=0.0, worst=2.0) == [1, 1]
    assert _knapsack.fill([table, table], budget=10, least=9, price=0.0, worst=0.5) is None
    assert _knapsack.fill([table, table], budget=10, least=9, price=0.1, worst=0.5) is None


def test_grids_move_to_a_choice_outside():
    # The first choice is off by more than the last windows reach.
    shapes = [(300, 200, 3), (200, 300, 3), (40, 40, 40)]
    forms, budget = tensors(network(shapes, 0.0)), 0.2 * sum(math.prod(shape) for shape in shapes)
    with patch.object(_allocate, "BOX", 10**6):
        optimum = _allocate.allocate(forms, budget).attenuation
    assert _allocate.allocate(forms, budget).attenuation <= optimum + 1e-12


# What a budget is for


def test_ranks_go_where_the_energy_is():
    flat, steep = np.ones(8), np.exp(-3.0 * np.arange(8.0))
    problem = [gt.Spectrum((10, 10), (flat, flat)), gt.Spectrum((10, 10), (steep, steep))]
    (a, _), (b, _) = gt.Budget(parameters=4 * 24)(problem)
    assert a > b
    scaled = [problem[0], gt.Spectrum((10, 10), (1e6 * steep, 1e6 * steep))]
    assert gt.Budget(parameters=4 * 24)(scaled) == gt.Budget(parameters=4 * 24)(problem)


def test_ranks_go_where_the_loss_is_sensitive():
    flat = gt.Spectrum((10, 10), (np.ones(8), np.ones(8)))
    ranks = gt.Budget(parameters=6 * 24)(with_sensitivities([flat, flat], [1.0, 5.0]))
    assert ranks[0][0] < ranks[1][0]
    # Without gradients, as behind a dead layer, a tensor counts little, and is not given up.
    ranks = gt.Budget(parameters=12 * 24)(with_sensitivities([flat, flat], [0.0, 5.0]))
    assert ranks == [(2, 2), (8, 8)]


def test_no_layer_becomes_a_bottleneck():
    # A rank of the wide layer costs 1300 and adds 1 / 500 to what it keeps: the sum of all that is
    # kept would be largest with rank 1, where a 500th arrives.
    flat = [gt.Spectrum(s, tuple(np.ones(min(n, math.prod(s) // n)) for n in s)) for s in LENET]
    ranks = gt.Budget(parameters=0.05)(flat)
    assert ranks == [(20, 1, 5, 5), (9, 18, 5, 5), (8, 8), (10, 10)]


def test_attenuations_are_exact():
    for tail in (1.0, 1e-3, 1e-7, 1e-14):  # the squares of small ones vanish beside 1
        values = np.array([1.0, *[tail] * 5])
        squares = [Fraction(value) ** 2 for value in values.tolist()]
        found = _budget._attenuations(1e200 * values, 8)
        assert found[0] == np.inf
        for rank in range(1, 7):
            lost = sum(squares[rank:]) / sum(squares)
            exact = -math.log1p(-float(lost))
            assert found[rank] == pytest.approx(exact, rel=1e-13, abs=0.0)
    many = np.ones(4096)
    assert _budget._attenuations(many, 8)[1] == pytest.approx(math.log(4096), rel=1e-15)
    assert np.array_equal(_budget._attenuations(np.zeros(3), 8), np.zeros(4))


def test_a_network_is_truncated_to_its_budget(backend):
    shapes = [(8, 3, 3, 3), (10, 8, 3, 3), (20, 12)]
    rng = np.random.default_rng(0)
    points = [gt.hosvd(backend.array(rng.standard_normal(s), "float32"), 99) for s in shapes]
    cuts = gt.truncate(points, gt.Budget(parameters=0.5))
    dense = sum(math.prod(shape) for shape in shapes)
    assert 0.49 * dense <= sum(cut.point.size for cut in cuts) <= 0.5 * dense


def test_zeros_are_not_paid_for():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 30))
    for dtype in (np.float64, np.float32):
        assert gt.hosvd(dense.astype(dtype), gt.Budget(parameters=1.0)).ranks == (3, 3)
    nothing = gt.Spectrum((4, 4), (np.zeros(4), np.zeros(4)))
    assert gt.Budget(parameters=1.0)([nothing]) == [(1, 1)]
    small = gt.Spectrum((40, 40), (10.0 ** -np.arange(9.0),) * 2)
    assert gt.Budget(parameters=10**6)([small]) == [(9, 9)]  # small is not zero


def test_a_fraction_in_half_precision_is_one():
    share = np.float16(0.5)
    rule, same = (gt.Budget(parameters=number) for number in (share, float(share)))
    tensor = np.random.default_rng(0).standard_normal((60, 50, 40))
    assert gt.hosvd(tensor, rule).ranks == gt.hosvd(tensor, same).ranks
    moving = gt.Budget(parameters=share, steps=10, start=np.float16(0.75))
    assert moving.at(10).parameters == 0.5


def test_a_budget_for_none_and_for_one():
    assert gt.Budget(parameters=1)([]) == []
    tensor = np.random.default_rng(0).standard_normal((6, 5, 4))
    assert gt.hosvd(tensor, gt.Budget(parameters=10**6)).ranks == (6, 5, 4)
    assert gt.hosvd(tensor, gt.Budget(parameters=10**6, cap=2)).ranks == (2, 2, 2)
    assert gt.hosvd(tensor, gt.Budget(parameters=size((6, 5, 4), (2, 2, 2)), floor=2)).ranks == (
        2,
        2,
        2,
    )


def hovering(first, second, previous, **settings):
    """Two matrices that compete for one rank."""
    facts = [gt.Facts(previous=ranks) for ranks in previous]
    problem = [
        gt.Spectrum((10, 10), (np.array([1.0, tail, 0.1]),) * 2, facts=fact)
        for tail, fact in zip((first, second), facts, strict=True)
    ]
    return gt.Budget(parameters=21 + 44, **settings)(problem)


def test_hysteresis_keeps_ranks_that_are_nearly_as_good():
    left, right = [(2, 2), (1, 1)], [(1, 1), (2, 2)]
    assert hovering(0.50, 0.51, [None, None]) == right
    assert hovering(0.50, 0.51, left) == left
    assert hovering(0.50, 0.51, right) == right
    assert hovering(0.50, 0.51, left, hysteresis=0.0) == right
    assert hovering(0.50, 0.60, left) == right  # clearly better
    assert hovering(0.50, 0.54, left) == right  # by 0.12 of the attenuation, less than 0.1 in all
    assert hovering(0.90, 0.99, left, hysteresis=0.15) == right  # by 0.13 of it, more than 0.15
    assert hovering(0.90, 0.99, left, hysteresis=0.19) == left
    assert hovering(0.50, 0.60, left, hysteresis=0.9) == left
    assert hovering(0.50, 0.51, [(2, 2), None]) == right  # not all are known
    assert hovering(0.50, 0.51, [(2, 2), (2, 2)]) == right  # not within the budget
    assert hovering(0.50, 0.51, [(1, 1), (1, 1)], hysteresis=0.99) == right  # too little
    assert hovering(0.50, 0.51, [(4, 4), (1, 1)]) == right  # more than there are values
    alone = gt.Spectrum((10, 10), (np.array([1.0, 0.5, 0.1]),) * 2, facts=gt.Facts((2, 1)))
    assert gt.Budget(parameters=40, hysteresis=0.99)([alone]) == [(1, 1)]  # no tensor has (2, 1)


def test_a_schedule_goes_geometrically_from_start_to_target():
    rule = gt.Budget(parameters=0.01, steps=100, start=1.0, floor=2, cap=9, hysteresis=0.3)
    assert [rule.at(step).parameters for step in (0, 50, 100, 101)] == pytest.approx(
        [1.0, 0.1, 0.01, 0.01]
    )
    assert rule.at(50) == gt.Budget(
        parameters=rule.at(50).parameters, floor=2, cap=9, hysteresis=0.3
    )
    growing = gt.Budget(flops=1000, steps=3, start=1)
    assert [growing.at(step).flops for step in range(5)] == [1, 10, 100, 1000, 1000]
    assert gt.Budget(bytes=0.5).at(0) == gt.Budget(bytes=0.5)
    assert gt.Budget(bytes=0.5, start=0.9).at(0) == gt.Budget(bytes=0.5)
    assert gt.Budget(bytes=0.5, steps=9).at(3) == gt.Budget(bytes=0.5)


@pytest.mark.parametrize(
    "integrator", [gt.TDLRT(0.5), gt.Tangent(0.5), gt.Standard(0.5), gt.Flow(0.5, substeps=2)]
)
def test_integrators_follow_the_schedule(integrator):
    target = np.random.default_rng(0).standard_normal((8, 7, 6))

    def objective(w):
        residual = gt.to_dense(w) - target
        return float(np.sum(residual**2)) / 2, residual

    rule = gt.Budget(parameters=30, steps=4, start=300)
    result = gt.minimize(objective, gt.hosvd(target, 4), integrator=integrator, ranks=rule, steps=6)
    sizes = [size((8, 7, 6), report.ranks) for report in result.history]
    limits = [rule.at(step).parameters for step in range(6)]
    assert all(s <= limit for s, limit in zip(sizes, limits, strict=True))
    assert sizes[0] > limits[1]


SQUARE = [gt.Spectrum((10, 10), (np.ones(4), np.ones(4)))] * 2

ERRORS = {
    "none": (lambda: gt.Budget(), "exactly one of parameters, flops and bytes, got none"),
    "two": (lambda: gt.Budget(parameters=1, bytes=2), "got parameters, bytes"),
    "0": (lambda: gt.Budget(parameters=0), "parameters: expected a fraction in (0, 1] or a pos"),
    "0.0": (lambda: gt.Budget(flops=0.0), "flops: expected a fraction in (0, 1]"),
    "1.5": (lambda: gt.Budget(bytes=1.5), "bytes: expected a fraction in (0, 1] or an integer"),
    "nan": (lambda: gt.Budget(bytes=np.nan), "bytes: expected a fraction in (0, 1]"),
    "True": (lambda: gt.Budget(bytes=True), "bytes: expected a fraction in (0, 1] or a positive"),
    "word": (lambda: gt.Budget(parameters="5 %"), "got '5 %'"),
    "floor": (lambda: gt.Budget(parameters=9, floor=0), "floor: expected a positive integer"),
    "cap": (lambda: gt.Budget(parameters=9, floor=3, cap=2), "at least floor = 3, got 2"),
    "hysteresis": (lambda: gt.Budget(parameters=9, hysteresis=1.0), "hysteresis: expected"),
    "steps": (lambda: gt.Budget(parameters=9, steps=-1), "steps: expected an integer of at"),
    "steps 1.5": (lambda: gt.Budget(parameters=9, steps=1.5), "steps: expected an integer"),
    "start": (lambda: gt.Budget(parameters=9, start=0), "start: expected a fraction in (0, 1]"),
    "mixed": (
        lambda: gt.Budget(parameters=0.1, steps=9, start=900),
        "start: expected a fraction or absolute as parameters = 0.1, got 900",
    ),
    "too small": (
        lambda: gt.Budget(parameters=41)(SQUARE),
        "parameters: expected at least 42 (0.21 of the dense tensors' 200), which the least ranks "
        "take with floor = 1, got 41",
    ),
    "too small a fraction": (
        lambda: gt.Budget(bytes=0.2, floor=2)(SQUARE),
        "bytes: expected at least 704 (0.44 of the dense tensors' 1600), which the least ranks "
        "take with floor = 2, got 0.2 (320)",
    ),
    "sensitivity": (
        lambda: gt.Budget(parameters=0.5)(with_sensitivities(SQUARE, [1.0, -1.0])),
        "sensitivity: expected a finite number of at least 0, got -1.0",
    ),
    "no operations": (
        lambda: gt.Budget(flops=0.5)(SQUARE),
        "flops: expected the operations of every tensor, got none for tensor 0 of shape (10, 10)",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_budgets_that_cannot_be_kept(what):
    call, message = ERRORS[what]
    with pytest.raises(gt.RankError, match=re.escape(message)):
        call()


def test_tensors_that_cost_nothing_dense_have_no_budget_of_a_fraction():
    point = gt.hosvd(np.ones((4, 3)), 1)
    free = gt.Facts(flops=gt.Cost(lambda ranks: 7 * ranks[0], 0))
    with pytest.raises(gt.RankError, match=r"flops: expected at least 7 \(dense: none\)"):
        gt.truncate([point], gt.Budget(flops=0.5), [free])
