"""Objectives: losses, gradients and curvatures against dense ones, sparsity, starts, errors."""

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt
from geotucker import _ops

from . import reference
from .cases import ANY_SHAPE, Case, assert_close, cases, step

LOSSES = {"squared": gt.Squared(), "logistic": gt.Logistic(), "poisson": gt.Poisson()}


def dense_loss(name, p, y):
    """Return losses, slopes and curvatures of numbers by the textbook."""
    if name == "squared":
        return 0.5 * (p - y) ** 2, p - y, np.ones_like(p)
    if name == "poisson":
        return np.exp(p) - y * p, np.exp(p) - y, np.exp(p)
    q = 1.0 / (1.0 + np.exp(-p))
    return -y * np.log(q) - (1 - y) * np.log(1 - q), q - y, q * (1 - q)


def data_for(name, case, *shape):
    numbers = case.normal(*shape, stream=50)
    return {"squared": numbers, "logistic": 1.0 * (numbers > 0), "poisson": np.floor(abs(numbers))}[
        name
    ]


def check(case, fit, losses, to_dense, ridge):
    """Compare a fit at a point with factors that are not orthonormal with its dense form.

    `losses` maps the dense predictions to losses, slopes, curvatures; `to_dense` is ``A^*``, given
    as the matrix of A acting on raveled tensors.
    """
    core, factors = case.pull(case.point(1))
    factors = [0.7 * u + 0.1 for u in factors]
    point = case.put(core, factors)
    w, matrix = case.dense(point), to_dense
    value, slope, bend = losses((matrix @ w.ravel()).reshape(fit.map.observed_shape))
    z = (matrix.T @ slope.ravel()).reshape(case.shape) + ridge * w
    loss, gradient = fit(point)
    assert isinstance(loss, float)
    assert loss == pytest.approx(value.sum() + 0.5 * ridge * np.sum(w**2), rel=1e-10, abs=1e-12)
    other = case.point(2).factors
    bases = case.pull((case.point().core, other))[1]
    scale = np.abs(matrix).sum() * np.abs(slope).max() + ridge * np.linalg.norm(w)
    for skip in (None, *range(len(case.shape))):
        expected = reference.transform(
            z, [None if mode == skip else u.T for mode, u in enumerate(bases)]
        )
        got = case.backend.numpy(gradient.contract(other, skip))
        assert_close(got, expected, 1e-12, scale)
    along = case.point(3)
    d = case.dense(along)
    expected = np.sum(bend.ravel() * (matrix @ d.ravel()) ** 2) + ridge * np.sum(d**2)
    assert gradient.curvature(along) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def drawn_fit(data, backend):
    case = data.draw(cases(backend, max_order=4, dtypes=["float64"]))
    if backend.name not in ANY_SHAPE:  # each loss is compiled there
        return case, "logistic", 0.3
    return case, data.draw(st.sampled_from(list(LOSSES))), data.draw(st.sampled_from([0.0, 0.3]))


@given(data=st.data())
def test_completion_is_its_dense_form(backend, data):
    case, name, ridge = drawn_fit(data, backend)
    size = int(np.prod(case.shape))
    count = 7 if backend.name not in ANY_SHAPE else data.draw(st.integers(1, 2 * size))
    flat = np.random.default_rng(case.seed).integers(0, size, count)  # some several times
    indices, y = np.unravel_index(flat, case.shape), data_for(name, case, count)
    fit = gt.completion(indices, case.array(y), case.shape, LOSSES[name], ridge)
    check(case, fit, lambda p: dense_loss(name, p, y), np.eye(size)[flat], ridge)


@given(data=st.data())
def test_least_squares_is_its_dense_form(backend, data):
    case, name, ridge = drawn_fit(data, backend)
    y = data_for(name, case, *case.shape)
    fit = gt.least_squares(case.array(y), LOSSES[name], ridge)
    check(case, fit, lambda p: dense_loss(name, p, y), np.eye(y.size), ridge)


@given(data=st.data())
def test_regression_is_its_dense_form(backend, data):
    case, name, ridge = drawn_fit(data, backend)
    order = len(case.shape)
    split = 1 if backend.name not in ANY_SHAPE else data.draw(st.integers(1, order))
    inputs, outputs = case.normal(4, *case.shape[:split], stream=51), case.shape[split:]
    y = data_for(name, case, 4, *outputs)
    fit = gt.regression(case.array(inputs), case.array(y), LOSSES[name], ridge)
    assert fit.shape == case.shape
    matrix = np.kron(inputs.reshape(4, -1), np.eye(int(np.prod(outputs))))
    check(case, fit, lambda p: dense_loss(name, p, y), matrix, ridge)


@pytest.mark.parametrize("name", LOSSES)
def test_slopes_are_derivatives(name):
    # The textbook's slopes, which the others are compared with, against differences.
    p, y, h = np.linspace(-3, 3, 7), np.array([0.0, 1, 0, 1, 1, 0, 1]), 1e-6
    for value, derivative in ((0, 1), (1, 2)):
        up, down = (dense_loss(name, p + s, y)[value] for s in (h, -h))
        assert np.allclose((up - down) / (2 * h), dense_loss(name, p, y)[derivative], atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_have_slope_two(name):
    case = Case(None, "float64", (5, 3, 4), (2, 2, 3), 0)
    point = gt.testing.random_point((5, 3, 4), (2, 2, 3))
    indices = np.nonzero(case.normal(5, 3, 4) > 0)
    y = data_for(name, case, len(indices[0]))
    fit = gt.completion(indices, y, (5, 3, 4), LOSSES[name], ridge=0.1)
    assert gt.testing.gradient_slope(fit, point) == pytest.approx(2.0, abs=0.1)


def test_large_numbers_do_not_overflow(backend):
    p = backend.array([-1000.0, 0.0, 1000.0], "float64")
    y = backend.array([0.0, 1.0, 1.0], "float64")
    logistic = gt.Logistic()
    assert logistic.value(p, y) == pytest.approx(np.log(2.0))
    assert backend.numpy(logistic.slope(p, y)).tolist() == [0.0, -0.5, 0.0]
    assert np.isinf(gt.Poisson().value(p, y))  # a line search steps back from it


def test_memory_is_that_of_the_entries():
    shape, count, rank = (3000, 3000, 3000), 20_000, 2
    rng = np.random.default_rng(0)
    indices = [rng.integers(0, n, count) for n in shape]
    point = gt.testing.random_point(shape, (rank,) * 3)
    peaks = []
    for some in (count // 2, count):
        tracemalloc.start()
        fit = gt.completion([rows[:some] for rows in indices], np.ones(some), shape)
        step(gt.ConjugateGradient(), point, fit, rank)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 60 * 8 * count * rank < 1e-3 * 8 * np.prod([float(n) for n in shape])
    assert peaks[1] < 2.2 * peaks[0]


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_many_entries_in_several_chunks(skew):
    # More than one chunk, slices of very different sizes, and slices without entries.
    rng = np.random.default_rng(0)
    shape, count = (40, 7, 300), 50_000
    indices = [(n * rng.random(count) ** (1.0 + skew)).astype(int) for n in shape]
    values = rng.standard_normal(count)
    point = gt.testing.random_point(shape, (3, 2, 4))
    w = gt.to_dense(point)
    loss, gradient = gt.completion(indices, values, shape)(point)
    z = np.zeros(shape)
    np.add.at(z, tuple(indices), w[tuple(indices)] - values)
    assert loss == pytest.approx(0.5 * np.sum((w[tuple(indices)] - values) ** 2))
    for skip in (None, 0, 1, 2):
        kept = [None if mode == skip else u.T for mode, u in enumerate(point.factors)]
        assert_close(gradient.contract(point.factors, skip), reference.transform(z, kept), 1e-12)
    blocks = [fit_blocks.entries.size for fit_blocks in gradient.ambient.map._blocks]
    assert max(blocks) < 2 * count + 300


def test_entries_forget_nothing(backend):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    point = case.point()
    indices = np.unravel_index(np.arange(60)[::-1], case.shape)
    entries = gt.Entries(indices, case.shape, point.core)
    assert entries.observed_shape == (60,)
    assert_close(backend.numpy(entries.predict(point)), case.dense(point)[indices], 1e-13)
    own = gt.Entries([backend.array(rows) for rows in indices], case.shape, point.core)
    assert_close(backend.numpy(own.predict(point)), case.dense(point)[indices], 1e-13)
    some = entries.select(np.array([3, 3, 0]))
    chosen = tuple(rows[[3, 3, 0]] for rows in indices)
    assert_close(backend.numpy(some.predict(point)), case.dense(point)[chosen], 1e-13)


# Autodiff.


@pytest.mark.parametrize("dense", [True, False])
@given(data=st.data())
def test_autodiff_is_the_dense_gradient(backend, data, dense):
    if backend.name not in ("pytorch", "jax"):
        objective = gt.Autodiff(lambda w: 0.0, dense=True)
        message = "automatic differentiation: expected arrays of PyTorch or JAX, got"
        with pytest.raises(gt.BackendError, match=message):
            objective(Case(backend, "float64", (5, 4), (2, 2), 0).point())
        return
    case = data.draw(cases(backend, max_order=3, dtypes=["float64"]))
    target = case.normal(*case.shape, stream=42)
    goal = case.array(target)

    def of_dense(w):
        return ((w - goal) ** 4).sum()

    def of_point(w):
        return of_dense(gt.to_dense(w))

    objective = gt.Autodiff(of_dense if dense else of_point, dense=dense)
    point, other = case.point(), case.point(1)
    loss, gradient = objective(point)
    residual = case.dense(point) - target
    assert loss == pytest.approx(np.sum(residual**4))
    z = 4 * residual**3
    vs = case.pull(other)[1]
    for skip in () if dense else (None, *range(len(case.shape))):
        kept = [None if mode == skip else v.T for mode, v in enumerate(vs)]
        got = case.backend.numpy(gradient.contract(other.factors, skip))
        assert_close(got, reference.transform(z, kept), 1e-10, np.linalg.norm(z))
    tangent = case.tangent(point, gt.project(point, gradient))
    assert_close(tangent, reference.project(*case.pull(point), z), 1e-9, np.linalg.norm(z))


def test_autodiff_refuses_what_it_cannot_differentiate():
    torch = pytest.importorskip("torch")
    core, factors = gt.testing.random_point((5, 4), (2, 2))
    point = (torch.tensor(core), [torch.tensor(u) for u in factors])
    with pytest.raises(gt.BackendError, match="function: expected a scalar that PyTorch computed"):
        gt.Autodiff(lambda w: torch.tensor(1.0), dense=True)(point)
    elsewhere = torch.ones((), requires_grad=True)  # a graph, but not to the tensor
    with pytest.raises(gt.BackendError, match="got Tensor without a graph to it"):
        gt.Autodiff(lambda w: 2.0 * elsewhere, dense=True)(point)
    for function, got in (
        (lambda w: w.sum().to(torch.complex128), "complex128 of shape ()"),
        (lambda w: w, "float64 of shape (5, 4)"),
        (lambda w: 1j, "complex of shape ()"),
    ):
        with pytest.raises(gt.BackendError, match=re.escape(f"got {got}")):
            gt.Autodiff(function, dense=True)(point)


# Starts and batches.


@given(data=st.data())
def test_a_start_of_full_data_is_the_tensor(backend, data):
    case = data.draw(cases(backend, dtypes=["float64"]))
    target = case.dense(case.point())
    start = gt.least_squares(case.array(target)).start(case.ranks)
    assert start.ranks == case.ranks
    assert_close(case.dense(start), target, 1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_a_start_is_better_than_nothing(name):
    case = Case(None, "float64", (9, 8, 7), (2, 2, 2), 0)
    indices = np.nonzero(case.normal(9, 8, 7) > 0)
    y = data_for(name, case, len(indices[0])) * (100.0 if name == "poisson" else 1.0)
    fit = gt.completion(indices, y, (9, 8, 7), LOSSES[name], ridge=0.1)
    start = fit.start(2)
    assert fit(start)[0] < fit(gt.scale(start, 0.0))[0]
    gt.testing.check_orthonormal(start)
    nothing = gt.completion(indices, 0.0 * y, (9, 8, 7)).start(2)
    assert np.all(gt.to_dense(nothing) == 0.0)


def test_batches(backend):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    inputs, y = case.normal(30, 5, 3), case.normal(30, 4, stream=1)
    whole = gt.regression(case.array(inputs), case.array(y), ridge=0.6)
    batches = whole.batches(10, seed=3)
    first = batches.at(0)
    assert first.map.observed_shape == (10, 4)
    assert first.ridge == pytest.approx(0.2)
    numbers = np.random.default_rng([3, 0]).integers(0, 30, 10)
    assert np.array_equal(backend.numpy(first.observed), y[numbers])
    assert np.array_equal(backend.numpy(first.map.inputs), inputs[numbers])
    assert np.array_equal(backend.numpy(batches.at(0).observed), backend.numpy(first.observed))
    assert not np.array_equal(backend.numpy(batches.at(1).observed), backend.numpy(first.observed))
    assert batches(case.point())[0] == whole(case.point())[0]


def test_a_batch_is_its_share_of_the_whole():
    truth = gt.testing.random_point((5, 3, 4), (2, 2, 3))
    point = gt.testing.random_point((5, 3, 4), (2, 2, 3), seed=1)
    whole = gt.completion(np.nonzero(np.ones((5, 3, 4))), gt.to_dense(truth).ravel(), (5, 3, 4))
    batches = whole.batches(20)
    losses = [batches.at(k)(point)[0] for k in range(500)]
    assert np.mean(losses) == pytest.approx(whole(point)[0] / 3, rel=0.1)


# Errors.

INDICES = [np.array([0, 1]), np.array([2, 0])]
ONES = np.ones(2)


def complete(indices=INDICES, values=ONES, shape=(3, 4), **settings):
    return gt.completion(indices, values, shape, **settings)


ERRORS = {
    "modes": (lambda: complete(INDICES[:1]), gt.ShapeError, "indices: expected one array for each"),
    "no mode": (lambda: complete([], shape=()), gt.ShapeError, "indices: expected one array"),
    "lengths": (
        lambda: complete([INDICES[0], np.array([1])]),
        gt.ShapeError,
        "indices[1]: expected shape (2,), got (1,)",
    ),
    "empty": (
        lambda: complete([np.array([], int)] * 2, np.ones(1)),
        gt.ShapeError,
        "indices[0]: expected shape (m,) with m at least 1, got (0,)",
    ),
    "too large": (
        lambda: complete([np.array([0, 3]), INDICES[1]]),
        gt.ShapeError,
        "indices[0]: expected from 0 to 2, got from 0 to 3",
    ),
    "negative": (
        lambda: complete([np.array([0, -1]), INDICES[1]]),
        gt.ShapeError,
        "got from -1 to 0",
    ),
    "no integers": (
        lambda: complete([ONES, INDICES[1]]),
        gt.BackendError,
        "indices[0]: expected integers, got float64",
    ),
    "values": (
        lambda: complete(values=np.ones(3)),
        gt.ShapeError,
        "observed: expected the shape (2,), got (3,)",
    ),
    "integers for values": (
        lambda: complete(values=np.ones(2, int)),
        gt.BackendError,
        "values: expected a real floating dtype, got int64",
    ),
    "NaN": (lambda: complete(values=ONES * np.nan), gt.NonFiniteError, "observed: expected finite"),
    "ridge": (lambda: complete(ridge=-1.0), ValueError, "ridge: expected a number of at least 0"),
    "no probability": (
        lambda: complete(values=2 * ONES, loss=gt.Logistic()),
        ValueError,
        "observed: expected numbers from 0 to 1",
    ),
    "no count": (
        lambda: complete(values=-ONES, loss=gt.Poisson()),
        ValueError,
        "observed: expected no negative numbers",
    ),
    "another shape": (
        lambda: complete()(gt.testing.random_point((4, 4), (1, 1))),
        gt.ShapeError,
        "point: expected a tensor of shape (3, 4), got (4, 4)",
    ),
    "another dtype": (
        lambda: complete(values=ONES.astype("f4"))(gt.testing.random_point((3, 4), (1, 1))),
        gt.BackendError,
        "point.core: expected numpy float32",
    ),
    "start": (
        lambda: complete().start(gt.Tolerance(0.1)),
        ValueError,
        "ranks: expected numbers for a start",
    ),
    "batch": (
        lambda: complete().batches(3),
        ValueError,
        "size: expected from 1 to 2 observations, got 3",
    ),
    "batch of all": (
        lambda: gt.least_squares(np.ones((3, 4))).batches(1).at(0),
        gt.ShapeError,
        "batches: a full tensor has no batches",
    ),
    "scalar": (lambda: gt.least_squares(np.ones(())), gt.ShapeError, "expected order at least 1"),
    "no tensors": (lambda: gt.regression(ONES, ONES), gt.ShapeError, "inputs: expected shape (m, "),
    "samples": (
        lambda: gt.regression(np.ones((3, 4)), np.ones(2)),
        gt.ShapeError,
        "outputs: expected one for each of 3 inputs, got shape (2,)",
    ),
    "inputs": (
        lambda: gt.regression(np.full((2, 3), np.inf), np.ones(2)),
        gt.NonFiniteError,
        "inputs: expected finite numbers",
    ),
    "shape": (
        lambda: gt.completion(([0], [1]), np.ones(1), (2.7, 2)),
        gt.ShapeError,
        "shape: expected integers, got (2.7, 2)",
    ),
    "start from what is too large": (
        lambda: gt.least_squares(1e200 * ONES, ridge=1.0).start(1),
        gt.NonFiniteError,
        "loss: expected a finite number, got inf; scale the data",
    ),
    "growth of what is too large": (
        lambda: gt.least_squares(ONES).grow(gt.hosvd(1e200 * ONES, 1), 2),
        gt.NonFiniteError,
        "loss: expected a finite number, got inf; scale the data",
    ),
    "outputs of another dtype": (
        lambda: gt.regression(np.ones((2, 3)), np.ones(2, "f4")),
        gt.BackendError,
        "outputs: expected numpy float64",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_sums_of_rows(backend):
    rows = np.arange(12.0).reshape(6, 2)
    owners = np.array([0, 0, 2, 3, 3, 3])
    got = _ops.add_rows(backend.array(rows), backend.array(owners), 5)
    expected = np.zeros((5, 2))
    np.add.at(expected, owners, rows)
    assert np.array_equal(backend.numpy(got), expected)
