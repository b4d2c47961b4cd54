"""Conjugate gradients, line search, growing ranks and batches: what they find, and how fast."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt
from geotucker._linesearch import backtrack

from . import reference
from .cases import ANY_SHAPE, Case, arrays_in, assert_close, assert_orthonormal, cases, step

CG = gt.ConjugateGradient()


class NUMPY:
    """NumPy where the library does not matter, in the form of the fixture."""

    name = "numpy"

    @staticmethod
    def array(values, dtype=None):
        return np.array(values, dtype)

    numpy = staticmethod(np.asarray)


@given(data=st.data())
def test_a_quadratic_in_full_ranks_is_solved_like_a_linear_system(backend, data):
    # In full ranks the manifold is flat, and the method that of Hestenes and Stiefel: exact after
    # as many steps as there are distinct eigenvalues, here of a random regression.
    case = data.draw(cases(backend, max_order=3, dtypes=["float64"]))
    if backend.name in ANY_SHAPE:
        shape = tuple(min(n, 3) for n in case.shape)
        shape = tuple(min(n, int(np.prod(shape)) // n) for n in shape) if len(shape) > 1 else (1,)
    else:
        shape = (2, 3, 2)
    size = int(np.prod(shape))
    basis = np.linalg.qr(case.normal(size + 3, size, stream=51))[0]
    values = np.array([1.0, 1.5, 2.0])[np.arange(size) % 3]
    inputs, y = (basis * values).reshape(-1, *shape), case.normal(size + 3, stream=52)
    start = Case(backend, "float64", shape, shape, case.seed).point()
    fit = gt.regression(case.array(inputs), case.array(y), ridge=0.5)
    result = gt.minimize(fit, start, integrator=CG, steps=3)
    matrix = inputs.reshape(len(y), -1)
    solution = np.linalg.solve(matrix.T @ matrix + 0.5 * np.eye(size), matrix.T @ y)
    assert_close(case.dense(result.point).ravel(), solution, 1e-8)


@given(data=st.data())
def test_the_first_step_is_the_exact_minimum_along_the_gradient(data):
    case = data.draw(cases(NUMPY, dtypes=["float64"]))
    target, point = case.normal(*case.shape, stream=42), case.point()
    fit = gt.least_squares(case.array(target))
    whole = step(CG, point, fit, lambda spectra: [tuple(map(len, s.values)) for s in spectra])
    z = case.dense(point) - target
    xi = reference.project(*case.pull(point), z)
    length = np.sum(z * xi) / max(np.sum(xi * xi), 1e-300)  # to the minimum of |z - t xi|
    assert_close(case.dense(whole.point), case.dense(point) - length * xi, 1e-9)
    assert whole.report.evaluations <= 2


def entries_of(case, share):
    indices = np.nonzero(np.random.default_rng(case.seed).random(case.shape) < share)
    truth = case.dense(case.point(1))
    return truth, gt.completion(indices, case.array(truth[indices]), case.shape)


def test_completion_recovers_a_tensor_of_low_rank(backend):
    case = Case(backend, "float64", (14, 13, 12), (2, 2, 2), 0)
    truth, fit = entries_of(case, 0.3)
    result = gt.minimize(
        fit,
        fit.start(case.ranks),
        integrator=CG,
        steps=100,
        stop=gt.when_flat(gradient_norm=1e-9),
    )
    assert result.stopped == "stop"
    assert_close(case.dense(result.point), truth, 1e-7)
    assert_orthonormal(case, result.point)
    losses = [report.loss for report in result.history]
    assert all(b <= a * (1 + 1e-12) + 1e-20 for a, b in pairwise(losses))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_completion_in_single_precision_does_not_depend_on_the_scale(backend, scale):
    # The squares of such numbers are beyond float32, and so were slopes and curvatures.
    case = Case(backend, "float32", (5, 3, 4), (2, 2, 3), 0)
    truth = scale * case.dense(case.point(1))
    fit = gt.completion(np.nonzero(truth), case.array(truth[np.nonzero(truth)]), case.shape)
    result = gt.minimize(fit, fit.start(case.ranks), integrator=CG, steps=15)
    assert_close(case.dense(result.point), truth, 1e-3)


@pytest.mark.parametrize(("inputs", "outputs"), [(1e3, 1e12), (1e8, 1.0)])
def test_regression_in_single_precision_does_not_depend_on_the_scale(backend, inputs, outputs):
    case = Case(backend, "float32", (4, 5), (2, 2), 0)
    x = case.normal(200, *case.shape, stream=51)
    y = x[:, 0].sum(1)
    fit = gt.regression(case.array(inputs * x), case.array(outputs * y))
    result = gt.minimize(fit, fit.start(2), integrator=CG, steps=8)
    assert result.loss < 1e-6 * outputs**2 * np.sum(y**2)


def test_conjugate_directions_pay():
    # Near an ill-conditioned minimum: steepest descent creeps.
    truth = gt.testing.random_point((8, 9, 10), (3, 3, 3), singular_values=(1.0, 0.3, 0.1))
    known = np.nonzero(np.random.default_rng(0).random((8, 9, 10)) < 0.5)
    fit = gt.completion(known, gt.to_dense(truth)[known], (8, 9, 10))
    start = gt.round(
        gt.add(truth, gt.scale(gt.testing.random_point((8, 9, 10), (3, 3, 3)), 3e-3)), 3
    )
    settings = {"steps": 300, "stop": gt.when_flat(gradient_norm=1e-8)}
    counts = [
        len(gt.minimize(fit, start, integrator=integrator, **settings).history)
        for integrator in (CG, gt.ConjugateGradient(conjugate=False))
    ]
    assert 2 * counts[0] < counts[1], counts


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_without_curvature_the_length_is_found_too(scale):
    # Scale-free: the first length follows the point, later ones the change of the gradient.
    truth = gt.testing.random_point((8, 9, 10), (2, 2, 2))
    target = scale * gt.to_dense(truth)

    def objective(w):
        residual = gt.to_dense(w) - target
        return 0.5 * np.sum(residual**2), residual

    start = gt.scale(gt.testing.random_point((8, 9, 10), (2, 2, 2), seed=1), scale)
    stop = gt.when_flat(gradient_norm=1e-8 * scale)
    result = gt.minimize(objective, start, integrator=CG, steps=200, stop=stop)
    assert_close(gt.to_dense(result.point), target, 1e-6)
    assert sum(report.evaluations for report in result.history) < 3 * len(result.history)


def test_going_on_equals_an_unbroken_run():
    case = Case(NUMPY, "float64", (8, 7, 6), (2, 2, 2), 0)
    _, fit = entries_of(case, 0.5)
    for objective, integrator in ((fit, CG), (fit.batches(60), gt.Tangent(0.5))):
        whole = gt.minimize(objective, fit.start(2), integrator=integrator, steps=6)
        half = gt.minimize(objective, fit.start(2), integrator=integrator, steps=3)
        rest = gt.minimize(objective, half.point, integrator=integrator, steps=3, state=half.state)
        assert half.history + rest.history == whole.history
        for a, b in zip(arrays_in(rest.point), arrays_in(whole.point), strict=True):
            assert np.array_equal(a, b)


def test_batches_of_entries_converge():
    case = Case(NUMPY, "float64", (14, 13, 12), (2, 2, 2), 0)
    truth, fit = entries_of(case, 0.3)
    seen = []
    result = gt.minimize(
        fit.batches(200),
        fit.start(2),
        integrator=gt.Tangent(2.0),
        steps=200,
        callback=lambda point, report: seen.append(report.loss),
    )
    assert_close(gt.to_dense(result.point), truth, 1e-3)
    assert result.loss == fit(result.point)[0]  # the whole loss, not a batch's


@pytest.mark.parametrize("integrator", [CG, gt.TDLRT(1.0), gt.Tangent(1.0)])
def test_ranks_grow_from_one(integrator):
    case = Case(NUMPY, "float64", (9, 8, 7), (3, 3, 3), 0)
    target = case.dense(case.point(1))
    fit = gt.least_squares(case.array(target))
    rule = gt.Growing(case.ranks, every=4)
    result = gt.minimize(fit, fit.start(1), integrator=integrator, ranks=rule, steps=60)
    assert [report.ranks[0] for report in result.history[:12]] == [1] * 4 + [2] * 4 + [3] * 4
    assert_close(case.dense(result.point), target, 1e-5)


@pytest.mark.parametrize(
    ("rule", "parameters"),
    [(2, 50), (gt.Budget(parameters=0.3), 100), (gt.Budget(parameters=40, steps=5, start=300), 40)],
)
def test_ranks_are_kept_where_they_cost_more_than_a_step_gains(rule, parameters):
    case = Case(NUMPY, "float64", (8, 7, 6), (4, 4, 4), 0)
    target = case.array(case.normal(*case.shape))
    fit, start = gt.least_squares(target), gt.hosvd(target, 4)
    result = gt.minimize(fit, start, integrator=CG, ranks=rule, steps=12)
    assert result.point.size <= parameters
    assert result.loss < fit(gt.round(start, result.point.ranks))[0]
    assert result.history[-1].ranks == result.point.ranks
    assert_orthonormal(case, result.point)


def test_growing_is_checked():
    for settings in ({"ranks": 0}, {"ranks": 2, "every": 0}, {"ranks": 2, "start": 0}):
        with pytest.raises(gt.RankError, match=f"{list(settings)[-1]}: expected"):
            gt.Growing(**settings)
    rule = gt.Growing((4, 4, 1), every=2)
    assert rule.at(4).for_shape((9, 9, 9)) == (3, 3, 1)
    assert rule.for_shape((9, 9, 9)) == (4, 4, 1)
    assert gt.hosvd(np.random.default_rng(0).random((5, 6)), gt.Growing(3)).ranks == (3, 3)


@pytest.mark.parametrize("name", ["logistic", "poisson"])
def test_losses_of_counts_and_signs_are_minimised(name):
    case = Case(NUMPY, "float64", (8, 7, 6), (2, 2, 2), 0)
    logits = case.dense(case.point(1))
    logits *= {"logistic": 20.0, "poisson": 3.0}[name] / np.abs(logits).max()
    rng = np.random.default_rng(0)
    draw = {
        "logistic": 1.0 * (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))),
        "poisson": rng.poisson(np.exp(logits)).astype(float),
    }[name]
    loss = {"logistic": gt.Logistic(), "poisson": gt.Poisson()}[name]
    fit = gt.least_squares(draw, loss, ridge=0.1)
    stop = gt.when_flat(gradient_norm=1e-5)
    result = gt.minimize(fit, fit.start(2), integrator=CG, steps=300, stop=stop)
    assert result.stopped == "stop"
    assert result.loss < fit(gt.hosvd(logits, 2))[0]
    assert np.corrcoef(gt.to_dense(result.point).ravel(), logits.ravel())[0, 1] > 0.4


@pytest.mark.parametrize("logit", [-30.0, -50.0])
def test_a_loss_that_is_flat_at_the_start_is_minimised(logit):
    # The second derivative is exp(logit): the length that follows from it is beyond all bounds.
    counts = np.random.default_rng(0).poisson(3.0, (6, 7, 8)).astype(float)
    fit = gt.least_squares(counts, gt.Poisson())
    start = gt.hosvd(np.full(counts.shape, logit), 1)
    result = gt.minimize(fit, start, integrator=CG, steps=40)
    constant = gt.hosvd(np.full(counts.shape, np.log(counts.mean())), 1)
    assert result.loss < fit(constant)[0]


def test_at_a_minimum_nothing_moves():
    point = gt.testing.random_point((5, 4, 3), (2, 2, 2))
    result = step(CG, point, gt.least_squares(gt.to_dense(point) * 0.0), 2)
    end = step(CG, result.point, gt.least_squares(gt.to_dense(point) * 0.0), 2)
    assert np.abs(gt.to_dense(end.point)).max() < 1e-30
    flat = step(CG, point, lambda w: (1.0, np.zeros((5, 4, 3))), 2)
    assert flat.point is point or np.array_equal(flat.point.core, point.core)
    assert flat.report.evaluations == 1


def test_a_loss_that_cannot_fall_leaves_the_point():
    # A gradient of the wrong sign: no length is good enough, and the point stays.
    point = gt.testing.random_point((5, 4, 3), (2, 2, 2))

    def objective(w):
        return 0.5 * gt.norm(w) ** 2, -gt.to_dense(w)

    result = step(gt.ConjugateGradient(trials=4), point, objective, 2)
    assert np.array_equal(result.point.core, point.core)
    assert result.state.moments == ()
    assert result.report.evaluations == 5


def test_backtracking():
    settings = {"decrease": 1e-4, "noise": 0.0}
    # The parabola's minimum, then no further; infinity and NaN are too large.
    assert backtrack(lambda t: ((t - 1) ** 2, t), 1.0, -2.0, 8.0, trials=9, **settings) == (
        1.0,
        1.0,
        2,
    )
    walls = [np.inf, np.nan, 0.9]
    length, _, count = backtrack(lambda t: (walls.pop(0), t), 1.0, -1e-3, 1.0, trials=9, **settings)
    assert length == pytest.approx(0.01)
    assert count == 3
    assert backtrack(lambda t: (2.0, t), 1.0, -1.0, 1.0, trials=3, **settings) == (0.0, None, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 0.0}, "first: expected a positive number"),
        ({"decrease": 1.0}, r"decrease: expected a number in \(0, 1\)"),
        ({"trials": 0}, "trials: expected a positive integer"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        gt.ConjugateGradient(**settings)


def test_an_objective_is_asked_once_for_a_point():
    point = gt.testing.random_point((5, 4, 3), (2, 2, 2))
    fit, seen = gt.least_squares(np.ones((5, 4, 3))), []

    def objective(w):
        seen.append(w)
        return fit(w)

    result = gt.minimize(objective, point, integrator=CG, steps=5)
    assert len({id(w) for w in seen}) == len(seen)
    # The start, and the trials: what the reports count beside the start of each step.
    assert len(seen) == 1 + sum(report.evaluations - 1 for report in result.history)
