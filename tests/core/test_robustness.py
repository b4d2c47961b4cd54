"""Gradients and shapes at the edge: zero, deficient, huge, tiny; 1,000 steps; NaN and infinity."""

import copy

import numpy as np
import pytest

import geotucker as gt

from . import reference
from .cases import ANY_SHAPE, Case, arrays_in, assert_close, assert_orthonormal, quadratic, step

INTEGRATORS = [
    pytest.param(gt.TDLRT, {}, id="tdlrt"),
    pytest.param(gt.Tangent, {}, id="tangent"),
    pytest.param(gt.Standard, {}, id="standard"),
    pytest.param(gt.Standard, {"augmented": False}, id="unconventional"),
    pytest.param(gt.Flow, {"substeps": 2}, id="flow"),
]
DTYPES = ["float64", "float32"]
ORDERS = [
    ((5,), (1,)),
    ((6, 5), (2, 2)),
    ((5, 3, 4), (2, 2, 3)),
    ((4, 1, 3, 2), (1, 1, 1, 1)),
    ((3, 3, 3, 2), (2, 3, 2, 2)),
    ((2, 3, 2, 2, 2), (2, 1, 2, 1, 1)),
]
BIG = {"float64": 1e300, "float32": 1e37}
# At 1e-300 the products of two numbers underflow; in float32 subnormals are 0 to JAX.
TINY = {"float64": 1e-300, "float32": 1e-35}


def kinds_of_gradient(case):
    """Return full gradients of every awkward kind by name, and None for one towards zero."""
    rng = np.random.default_rng(case.seed)
    vectors = [rng.standard_normal(n) for n in case.shape]
    one = reference.reconstruct(np.ones((1,) * len(vectors)), [v[:, None] for v in vectors])
    noise = rng.standard_normal(case.shape)
    return {
        "random": noise,
        "deficient": one,
        "zero": 0 * noise,
        "one entry": one * (one == one.max()),
        "tiny": TINY[case.dtype] * noise,
        "home": None,  # W itself: the step shrinks W
        "mixed scales": noise * 10.0 ** rng.uniform(-12, 0, case.shape),
    }


def given_gradient(case, gradient):
    """Return an objective with this gradient everywhere (a copy of W if None)."""
    fixed = None if gradient is None else case.array(gradient)
    return lambda w: (0.0, case.array(case.dense(w)) if fixed is None else fixed)


def steps_on(backend):
    """Return how many steps a long run takes.

    What adds up over 1000 of them is the algorithm's, which is one for all libraries; that the
    decompositions of each are good enough for it, the shortest run in which bases are looked at
    after every kind of gradient shows.
    """
    return 1000 if backend.name == "numpy" else 42


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("integrator", "settings"), INTEGRATORS[:4])
def test_bases_stay_orthonormal_over_1000_steps(backend, dtype, integrator, settings):
    if backend.name not in ANY_SHAPE and dtype == "float64":
        pytest.skip("JAX compiles seconds per dtype: float32, which rounds more, stands for both")
    slow = integrator is gt.Standard  # d + 1 gradients
    shape, ranks = ((6, 5), (2, 2)) if slow else ((5, 3, 4), (2, 2, 3))
    case = Case(backend, dtype, shape, ranks, 0)
    integrator = integrator(0.2, gt.HeavyBall(0.5), **settings)
    objectives = [given_gradient(case, g) for g in kinds_of_gradient(case).values()]
    point, state = case.point(), integrator.init(case.point())
    for number in range(steps_on(backend)):
        objective = objectives[number % len(objectives)]
        point, state, _ = integrator.step(point, objective, state, gt.Fixed(case.ranks))
        if number % 6 == 0:  # 7 kinds of gradient: after another one each time
            assert_orthonormal(case, point)
    assert_orthonormal(case, point)
    assert point.ranks == case.ranks
    assert np.isfinite(case.dense(point)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_gradients_to_and_fro_over_1000_steps(backend, dtype):
    case = Case(backend, dtype, (6, 5), (2, 2), 0)
    rng = np.random.default_rng(0)
    integrator = gt.TDLRT(1e-3)
    point, state = case.point(), integrator.init(case.point())
    for number in range(steps_on(backend)):
        z = BIG[dtype] / 10 * rng.standard_normal(case.shape)
        objective = given_gradient(case, z if number % 2 else -z)
        point, state, report = integrator.step(point, objective, state, gt.Fixed(2))
        if number % 10 == 9:
            assert_orthonormal(case, point)
    assert 1e-3 * BIG[dtype] < report.gradient_norm < np.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "ranks"), ORDERS)
@pytest.mark.parametrize(("integrator", "settings"), INTEGRATORS)
def test_every_kind_of_gradient_in_every_order(backend, dtype, shape, ranks, integrator, settings):
    case = Case(backend, dtype, shape, ranks, 1)
    integrator = integrator(0.5, **settings)
    everything = kinds_of_gradient(case) | {"huge": BIG[dtype] / 10 * case.normal(*shape)}
    if backend.name not in ANY_SHAPE:
        if integrator != gt.TDLRT(0.5) or dtype == "float32" or shape == (3, 3, 3, 2):
            pytest.skip("JAX compiles seconds per shape: TDLRT in float64 stands for the others")
        everything = {name: everything[name] for name in ("zero", "deficient", "huge")}
    for gradient in everything.values():
        point, objective = case.point(), given_gradient(case, gradient)
        result = step(integrator, point, objective, gt.Tolerance(1e-3))
        assert_orthonormal(case, result.point)
        w, end = case.dense(point), case.dense(result.point)
        z = w if gradient is None else gradient.astype(dtype).astype(np.float64)
        size = max(np.abs(z).max(), 1e-300)
        projected = np.linalg.norm(reference.project(*case.pull(point), z / size))
        assert abs(result.report.gradient_norm / size - projected) <= case.tol * projected
        # Not longer than W and the step together, and gone nowhere without a gradient.
        scale = max(size, 1.0)
        length = np.linalg.norm(w / scale) + 0.5 * np.linalg.norm(z / scale)
        assert np.linalg.norm(end / scale) <= length * (1 + case.tol)
        if size < 1e-20:
            assert_close(end, w, 2e-3)


@pytest.mark.parametrize("exponent", [-300, -200, -160, 160, 200, 300])
@pytest.mark.parametrize(("integrator", "settings"), INTEGRATORS)
def test_a_step_knows_no_scale(backend, exponent, integrator, settings):
    # W and Z both scaled: products of the two, as in grad_{U_i} L, would over- or underflow.
    scale = 10.0**exponent
    case = Case(backend, "float64", (6, 5), (2, 2), 0)
    target = case.normal(6, 5, stream=42)
    ends = []
    for factor in (1.0, scale):
        objective = given_difference(case, factor * target)
        point = gt.scale(case.point(), factor)
        end = step(integrator(0.5, **settings), point, objective, gt.Tolerance(0.2)).point
        assert_orthonormal(case, end)
        ends.append(case.dense(end) / factor)
    assert_close(ends[1], ends[0], 1e-10)


def given_difference(case, target):
    """Return an objective with gradient W - A whose loss does not overflow."""
    return lambda w: (0.0, case.array(case.dense(w) - target))


@pytest.mark.parametrize("start", ["zero", "deficient"])
@pytest.mark.parametrize(("integrator", "settings"), INTEGRATORS[:4])
def test_a_deficient_start_finds_its_way(backend, start, integrator, settings):
    # The core has rows of zeros; no inverse of it may matter, and descent must still work.
    case = Case(backend, "float64", (6, 5), (2, 2), 0)
    core, factors = case.pull(case.point())
    core[1:] = 0.0
    if start == "zero":
        core[:] = 0.0
    point = case.put(core, factors)
    target = case.dense(case.point(1))
    objective, _ = quadratic(case, target)
    result = gt.minimize(objective, point, integrator=integrator(0.5, **settings), steps=50)
    assert_close(case.dense(result.point), target, 1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("integrator", "settings"), INTEGRATORS)
@pytest.mark.parametrize("form", ["dense", "factored", "contractable", "second"])
def test_nothing_changes_when_a_gradient_is_not_finite(backend, bad, integrator, settings, form):
    case = Case(backend, "float64", (5, 3, 4), (2, 2, 3), 0)
    integrator = integrator(0.1, gt.HeavyBall(0.5), **settings)
    z = case.normal(*case.shape)
    point, state, _ = step(integrator, case.point(), given_gradient(case, z), gt.Fixed(2))
    arrays = list(arrays_in((point, state.moments)))
    before = [copy.deepcopy(backend.numpy(array)) for array in arrays]
    spoilt = z.copy()
    spoilt[1, 2, 0] = bad
    calls = []

    class Contractable:
        def contract(self, factors, skip):
            size = [(u.shape[0] if i == skip else u.shape[1]) for i, u in enumerate(factors)]
            return case.array(np.full(size, bad))

    def objective(w):
        calls.append(w)
        if form == "contractable":
            return 0.0, Contractable()
        if form == "factored":
            factors = [case.array(np.ones((n, 1))) for n in case.shape]
            return 0.0, (case.array(np.full((1, 1, 1), bad)), factors)
        return 0.0, case.array(spoilt if form == "dense" or len(calls) > 1 else z)

    single = isinstance(integrator, (gt.TDLRT, gt.Tangent))
    if form == "second" and single:
        integrator.step(point, objective, state, gt.Fixed(2))  # asks once: all is well
    else:
        with np.errstate(invalid="ignore"), pytest.raises(gt.NonFiniteError, match="gradient"):
            integrator.step(point, objective, state, gt.Fixed(2))
    for array, copied in zip(arrays, before, strict=True):
        assert np.array_equal(backend.numpy(array), copied)
    assert state.step == 1


@pytest.mark.parametrize("augmented", [True, False])
def test_the_gradient_in_new_bases_is_checked_too(backend, augmented):
    case = Case(backend, "float64", (6, 5), (2, 2), 0)
    calls = []

    def objective(w):
        calls.append(w)
        return 0.0, case.array(np.full((6, 5), np.nan if len(calls) == 3 else 1.0))

    with np.errstate(invalid="ignore"), pytest.raises(gt.NonFiniteError, match=r"^gradient:"):
        step(gt.Standard(0.1, augmented=augmented), case.point(), objective, 2)


@pytest.mark.parametrize(("integrator", "settings"), INTEGRATORS)
def test_a_step_that_overflows_raises(backend, integrator, settings):
    case = Case(backend, "float64", (6, 5), (2, 2), 0)
    z = case.array(np.full((6, 5), 1e300))
    told = "core after the step|directions|gradient"  # the standard one's K-steps overflow first
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(gt.NonFiniteError, match=told):
        step(integrator(1e10, **settings), case.point(), lambda w: (0.0, z), 2)


def test_dtype_of_a_scheme_is_checked(backend):
    case = Case(backend, "float32", (6, 5), (2, 2), 0)
    double = Case(backend, "float64", (6, 5), (2, 2), 0)

    def promotes(core, gradient, lr, moments):
        return double.array(backend.numpy(core)), moments

    z = case.array(case.normal(6, 5))
    with pytest.raises(gt.BackendError, match="core after the step"):
        step(gt.TDLRT(0.1, promotes), case.point(), lambda w: (0.0, z), 2)
