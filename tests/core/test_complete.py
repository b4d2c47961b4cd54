"""Completion that chooses for itself, pooled slices, and points that grow."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt
from geotucker._complete import _common

from . import reference
from .cases import ANY_SHAPE, Case, assert_close, cases

SHAPE = (7, 6, 5)


def root(n, pooling):
    """Return the square root of the matrix of correlations."""
    values, vectors = np.linalg.eigh((1.0 - pooling) * np.eye(n) + pooling)
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


@given(data=st.data())
def test_a_pooled_map_is_its_dense_form(backend, data):
    case = data.draw(cases(backend, max_order=4, dtypes=["float64"]))
    pooling = 0.3 if backend.name not in ANY_SHAPE else data.draw(st.floats(0.0, 0.99))
    roots = [root(n, pooling) for n in case.shape]
    pooled = gt.Pooled(gt.Full(case.shape), pooling)
    core, factors = case.pull(case.point())
    tensor = case.dense(pooled.tensor(case.point()))
    expected = reference.reconstruct(core, [a @ u for a, u in zip(roots, factors, strict=True)])
    assert_close(tensor, expected, 1e-12)
    assert_close(backend.numpy(pooled.predict(case.point())), expected, 1e-12)
    back = case.dense(pooled.coordinates(pooled.tensor(case.point())))
    assert_close(back, case.dense(case.point()), 1e-11)
    weights = case.normal(*case.shape, stream=60)
    adjoint = pooled.adjoint(case.array(weights))
    dense = weights
    for mode, a in enumerate(roots):
        dense = np.moveaxis(np.tensordot(a, dense, (1, mode)), 0, mode)
    bases = case.pull(case.point(1))[1]
    for skip in (None, *range(len(case.shape))):
        want = dense
        for mode, u in enumerate(bases):
            if mode != skip:
                want = np.moveaxis(np.tensordot(u, want, (0, mode)), 0, mode)
        got = backend.numpy(adjoint.contract(case.point(1).factors, skip))
        assert_close(got, want, 1e-12, scale=np.linalg.norm(dense))


@pytest.mark.parametrize("pooling", [0.0, 0.5, 0.9])
def test_at_full_ranks_a_pooled_ridge_is_kriging(pooling):
    # The minimum is the posterior mean for the prior that the docstring states.
    rng = np.random.default_rng(0)
    shape, noise = (4, 3, 3), 0.3
    flat = rng.permutation(36)[:20]
    indices, y = np.unravel_index(flat, shape), rng.standard_normal(20) + 2.0
    entries = gt.Entries(indices, shape, y)
    fit = gt.Fit(gt.Pooled(entries, pooling), y, ridge=noise)
    result = gt.minimize(
        fit,
        fit.start(shape),
        integrator=gt.ConjugateGradient(),
        steps=300,
        stop=gt.when_flat(gradient_norm=1e-10),
    )
    prior = np.ones((1, 1))
    for n in shape:
        prior = np.kron(prior, (1.0 - pooling) * np.eye(n) + pooling)
    seen = prior[np.ix_(flat, flat)] + noise * np.eye(20)
    expected = prior[:, flat] @ np.linalg.solve(seen, y)
    assert_close(gt.to_dense(fit.map.tensor(result.point)).ravel(), expected, 1e-7)


def test_some_of_the_observations_of_a_pooled_map(backend):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    entries = gt.Entries(np.nonzero(np.ones(case.shape)), case.shape, case.point().core)
    pooled = gt.Pooled(entries, 0.4)
    numbers = np.array([3, 1, 50])
    some, every = (m.predict(case.point()) for m in (pooled.select(numbers), pooled))
    assert_close(backend.numpy(some), backend.numpy(every)[numbers], 1e-13)


# Growth.


@given(data=st.data())
def test_a_point_grows_where_the_loss_is_no_higher(backend, data):
    case = data.draw(cases(backend, max_order=4, dtypes=["float64"]))
    fit = gt.least_squares(case.array(case.normal(*case.shape, stream=70)))
    small = case.point(ranks=(1,) * len(case.shape))
    grown = fit.grow(small, case.ranks)
    assert grown.ranks == case.ranks
    assert fit(grown)[0] <= (1.0 + 1e-12) * fit(small)[0]
    assert fit.grow(grown, 1).ranks == case.ranks


def test_growth_leaves_a_minimum_of_lower_ranks():
    truth = gt.testing.random_point(SHAPE, (3, 3, 3))
    fit = gt.least_squares(gt.to_dense(truth))
    low = gt.minimize(fit, fit.start(1), integrator=gt.ConjugateGradient(), steps=100)
    assert low.history[-1].gradient_norm < 1e-6
    grown = fit.grow(low.point, 3)
    assert fit(grown)[0] < 0.9 * low.loss
    exact = gt.minimize(fit, grown, integrator=gt.ConjugateGradient(), steps=60)
    assert exact.loss < 1e-10
    stays = fit.grow(exact.point, 3)
    assert_close(gt.to_dense(stays), gt.to_dense(truth), 1e-4)


def test_growth_refuses_rules():
    fit = gt.least_squares(np.ones((3, 4)))
    with pytest.raises(ValueError, match="ranks: expected numbers"):
        fit.grow(fit.start(1), gt.Tolerance(0.1))
    with pytest.raises(gt.ShapeError, match="point: expected a tensor of shape"):
        fit.grow(gt.testing.random_point((4, 4), (1, 1)), 2)


# Everything chosen.


def ticks():
    """Return a clock that goes on by one each time it is read."""
    counter = itertools.count()
    return lambda: float(next(counter))


def observed(tensor, count, seed=0):
    chosen = np.random.default_rng(seed).permutation(tensor.size)
    return (np.unravel_index(part, tensor.shape) for part in np.split(chosen, [count]))


def relative_error(point, tensor, rest):
    return np.linalg.norm((gt.to_dense(point) - tensor)[rest]) / np.linalg.norm(tensor[rest])


def test_exact_data_of_low_rank_are_found_without_pooling():
    tensor = gt.to_dense(gt.testing.random_point((12, 11, 10), (2, 2, 2), seed=1))
    known, rest = observed(tensor, 900)
    result = gt.complete(
        known, tensor[known], tensor.shape, candidates=[2], steps=30, clock=ticks(), seconds=500
    )
    assert result.pooling == 0.0
    assert relative_error(result.point, tensor, rest) < 0.02
    gt.testing.check_orthonormal(result.point)


def test_few_noisy_entries_do_better_than_the_mean_and_than_a_plain_fit():
    rng = np.random.default_rng(3)
    effects = [rng.standard_normal(n) for n in (12, 8, 6)]
    truth = np.add.outer(np.add.outer(*effects[:2]), effects[2]) + 2.0
    noisy = truth + rng.standard_normal(truth.shape)
    known, rest = observed(truth, 60)
    result = gt.complete(known, noisy[known], truth.shape, clock=ticks(), seconds=300)
    mean = np.linalg.norm(truth[rest] - noisy[known].mean()) / np.linalg.norm(truth[rest])
    fit = gt.completion(known, noisy[known], truth.shape)
    plain = gt.minimize(fit, fit.start(1), integrator=gt.ConjugateGradient(), steps=30)
    got = relative_error(result.point, truth, rest)
    assert got < 0.8 * min(mean, relative_error(plain.point, truth, rest))
    assert result.pooling > 0.0
    assert result.error in [trial.error for trial in result.trials]


def test_noise_alone_is_predicted_as_hardly_anything():
    noise = np.random.default_rng(5).standard_normal(SHAPE)
    known, rest = observed(noise, 60)
    result = gt.complete(known, noise[known], SHAPE, clock=ticks(), seconds=300)
    assert relative_error(result.point, noise, rest) < 1.2


def test_the_result_is_a_minimum_of_what_it_says(backend):
    if backend.name not in ANY_SHAPE:
        pytest.skip("each fold has shapes of its own, for which everything would be compiled")
    case = Case(backend, "float64", SHAPE, (2, 2, 2), 0)
    tensor = case.dense(case.point()) + 0.1 * case.normal(*SHAPE)
    known, _ = observed(tensor, 100)
    values = case.array(tensor[known])
    result = gt.complete(known, values, SHAPE, candidates=[2], clock=ticks(), seconds=150)
    pooled = gt.Pooled(gt.Entries(known, SHAPE, values), result.pooling)
    fit = gt.Fit(pooled, values, ridge=result.ridge)
    start = gt.orthonormalise(pooled.coordinates(result.point))
    better = gt.minimize(fit, start, integrator=gt.ConjugateGradient(), steps=20)
    assert better.loss > 0.95 * fit(start)[0]
    assert type(result.point.core) is type(values)
    assert result.point.core.dtype == values.dtype


def test_the_same_seed_gives_the_same():
    tensor = gt.to_dense(gt.testing.random_point(SHAPE, (2, 2, 2)))
    known, _ = observed(tensor, 60)

    def result(seed):
        return gt.complete(known, tensor[known], SHAPE, clock=ticks(), seconds=60, seed=seed)

    assert result(0).trials == result(0).trials
    assert result(0).trials != result(1).trials


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_ranks_that_came_with_more_steps_are_given_back(noise):
    # Ranks grow while each fit still gains by its steps, and beyond what the tensor has.
    shape = (12, 12, 12)
    tensor = gt.to_dense(gt.testing.random_point(shape, (3, 3, 3), seed=0))
    tensor /= tensor.std()
    known, rest = observed(tensor, 1000)
    values = tensor[known] + noise * np.random.default_rng(1).standard_normal(1000)
    result = gt.complete(known, values, shape, folds=2, clock=ticks(), seconds=2000)
    assert any(trial.ranks > (3, 3, 3) for trial in result.trials)
    assert result.point.ranks == (3, 3, 3)
    assert relative_error(result.point, tensor, rest) < 0.5 * noise + 1e-4


@pytest.mark.parametrize("scale", [1e-200, 1e160])
def test_units_do_not_matter(scale):
    tensor = 2.0 + gt.to_dense(gt.testing.random_point(SHAPE, (2, 2, 2)))
    known, _ = observed(tensor, 60)
    one, other = (
        gt.complete(known, unit * tensor[known], SHAPE, clock=ticks(), seconds=150)
        for unit in (1.0, scale)
    )
    assert one.point.ranks == other.point.ranks
    assert one.error == pytest.approx(other.error, rel=1e-6)
    found = gt.to_dense(other.point) / scale
    assert np.allclose(found, gt.to_dense(one.point), rtol=1e-5)


def test_all_ranks_are_tried_where_all_is_known():
    assert _common((2, 2), 4) == [1, 2]
    assert _common((3, 3, 3), 27) == [1, 2, 3]
    assert _common((3, 3, 3), 26) == [1, 2]


def test_time_ends_the_search():
    tensor = gt.to_dense(gt.testing.random_point(SHAPE, (2, 2, 2)))
    known, _ = observed(tensor, 60)
    counts = [
        len(gt.complete(known, tensor[known], SHAPE, clock=ticks(), seconds=seconds).trials)
        for seconds in (1, 120, 300)
    ]
    assert counts[0] == 1
    assert counts[0] < counts[1] < counts[2]


def test_of_many_entries_one_fold_is_held_out():
    shape = (40, 40, 40)
    tensor = gt.to_dense(gt.testing.random_point(shape, (2, 2, 2)))
    known, rest = observed(tensor, 50_000)
    result = gt.complete(known, tensor[known], shape, candidates=[2], clock=ticks(), seconds=60)
    assert len(result.trials) > 3  # five folds would have taken the time for two
    assert relative_error(result.point, tensor, rest) < 0.1


def test_nothing_but_zeros():
    known, _ = observed(np.zeros(SHAPE), 20)
    result = gt.complete(known, np.zeros(20), SHAPE, clock=ticks(), seconds=100)
    assert gt.norm(result.point) == 0.0
    assert result.error == 0.0


KNOWN = [np.array([0, 1, 2]), np.array([0, 1, 2]), np.array([0, 1, 2])]


def complete(indices=KNOWN, values=(1.0, 2.0, 3.0), shape=SHAPE, **settings):
    return gt.complete(indices, np.asarray(values), shape, **{"folds": 2, **settings})


ERRORS = {
    "integers": (lambda: complete(values=(1, 2, 3)), gt.BackendError, "values: expected a real"),
    "NaN": (lambda: complete(values=(1.0, 2.0, math.nan)), gt.NonFiniteError, "values"),
    "values": (lambda: complete(values=(1.0, 2.0)), gt.ShapeError, "values: expected shape (3,)"),
    "outside": (lambda: complete(shape=(7, 2, 5)), gt.ShapeError, "indices[1]: expected from 0 to"),
    "one fold": (
        lambda: complete(folds=1),
        ValueError,
        "folds: expected an integer of at least 2, got 1",
    ),
    "folds": (lambda: complete(folds=2.5), ValueError, "folds: expected an integer of at least 2"),
    "one entry": (
        lambda: complete([k[:1] for k in KNOWN], (1.0,)),
        gt.ShapeError,
        "values: expected at least two entries",
    ),
    "half precision": (
        lambda: complete(values=np.ones(3, "f2")),
        gt.BackendError,
        "values: expected float32 or float64, got float16",
    ),
    "steps": (lambda: complete(steps=0), ValueError, "steps: expected a positive integer, got 0"),
    "half a step": (lambda: complete(steps=1.5), ValueError, "steps: expected a positive integer"),
    "seconds": (lambda: complete(seconds=0.0), ValueError, "seconds: expected a positive number"),
    "rank": (lambda: complete(candidates=3), gt.RankError, "candidates: expected a sequence of"),
    "order": (
        lambda: complete(candidates=[(2, 3, 2), (3, 2, 3)]),
        gt.RankError,
        "candidates: expected ranks from small to large, got (3, 2, 3) after (2, 3, 2)",
    ),
    "pooling": (
        lambda: gt.Pooled(gt.Full(SHAPE), 1.0),
        ValueError,
        "pooling: expected a number in [0, 1), got 1.0",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=re.escape(message)):
        call()
