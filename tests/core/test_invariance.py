"""Laws that need no formula: gauge invariance, exactness, and momentum in moving bases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt

from . import reference
from .cases import Case, assert_close, cases, feasible, keep_all, quadratic, step

ALL = [
    pytest.param(gt.TDLRT, {}, id="tdlrt"),
    pytest.param(gt.Tangent, {}, id="tangent"),
    pytest.param(gt.Standard, {}, id="standard"),
    pytest.param(gt.Standard, {"augmented": False}, id="unconventional"),
    pytest.param(gt.Flow, {"substeps": 3}, id="flow"),
]


def rotations(case):
    """Return an orthogonal matrix for every mode of the core."""
    return [np.linalg.qr(case.normal(r, r, stream=60 + i))[0] for i, r in enumerate(case.ranks)]


@pytest.mark.parametrize("scheme", [gt.Euler(), gt.HeavyBall(0.7)])
@pytest.mark.parametrize(("integrator", "settings"), ALL)
@given(data=st.data())
def test_gauge_invariance(backend, data, integrator, settings, scheme):
    # (C x_i O_i^T, U_i O_i) is the same tensor, with the same tangent vectors for moments.
    case = data.draw(cases(backend, dtypes=["float64"]))
    integrator = integrator(0.2, scheme, **settings)
    objective, _ = quadratic(case, case.normal(*case.shape, stream=42))
    core, factors = case.pull(case.point())
    velocity = case.array(case.normal(*case.shape, stream=43))
    o = rotations(case)
    turned = case.put(
        reference.transform(core, [m.T for m in o]),
        [u @ m for u, m in zip(factors, o, strict=True)],
    )
    ends = []
    for point in (case.point(), turned):
        moments = [gt.project(point, velocity) for _ in integrator.init(point).moments]
        state = gt.State(0, tuple(moments))
        for _ in range(2):
            point, state, _ = step(integrator, point, objective, case.ranks, state)
        ends.append([case.dense(point), *ambient_moments(case, point, state)])
    for got, expected in zip(*ends, strict=True):
        assert_close(got, expected, 1e-7)


def ambient_moments(case, point, state):
    return [case.dense(gt.tangent_to_point(point, moment)) for moment in state.moments]


@pytest.mark.parametrize(("integrator", "settings"), ALL[:4])
@given(data=st.data())
def test_a_path_in_the_bases_is_reproduced(backend, data, integrator, settings):
    # L = |W - A|^2 / 2 with A in the span of the bases: a step of length 1 ends at A.
    case = data.draw(cases(backend))
    point = case.point()
    target = case.dense((case.array(case.normal(*case.ranks, stream=44)), point.factors))
    objective, _ = quadratic(case, target)
    result = step(integrator(1.0, **settings), point, objective, case.ranks)
    assert_close(case.dense(result.point), target, 10 * case.tol)


@pytest.mark.parametrize(("integrator", "settings"), [ALL[0], ALL[2], ALL[3]])
@given(data=st.data(), smallest=st.sampled_from([1.0, 1e-4, 1e-8, 1e-12]))
def test_a_path_on_the_manifold_is_reproduced(backend, data, integrator, settings, smallest):
    # Along A0 + t (A1 - A0), both of the manifold's rank, a step of length 1 ends at A1: the
    # exactness of the BUG integrators, whatever the singular values of start and end are.
    case = data.draw(cases(backend, dtypes=["float64"]))
    start, end = spread(case, 0, smallest), spread(case, 1, smallest)
    z = case.dense(start) - case.dense(end)
    result = step(integrator(1.0, **settings), start, lambda w: (0.0, case.array(z)), case.ranks)
    assert_close(case.dense(result.point), case.dense(end), 1e-9)


def spread(case, stream, smallest):
    """Return a point whose unfoldings have singular values down to `smallest` or below.

    Their directions are hidden: no column of a factor is small by itself.
    """
    core, factors = case.pull(case.point(stream))
    o = rotations(case)
    scales = [smallest ** np.linspace(0.0, 1.0, r) for r in core.shape]
    core = reference.transform(core, [m * s for m, s in zip(o, scales, strict=True)])
    return case.put(core / np.linalg.norm(core), factors)


@pytest.mark.parametrize(("integrator", "settings"), ALL[:4])
@pytest.mark.parametrize(("shape", "dtype"), [((3, 3), "float32"), ((2, 3, 4), "float64")])
def test_heavy_ball_at_full_rank_is_the_dense_one(backend, shape, dtype, integrator, settings):
    case = Case(backend, dtype, shape, shape, 0)
    point = case.point()
    objective, gradient = quadratic(case, case.normal(*shape, stream=42))
    w, v = case.dense(point), np.zeros(shape)
    integrator, state = integrator(0.1, gt.HeavyBall(0.9), **settings), None
    for _ in range(8):
        v = 0.9 * v + gradient(w)
        w = w - 0.1 * v
        point, state, _ = step(integrator, point, objective, keep_all, state)
        assert_close(case.dense(point), w, case.tol)
        assert_close(ambient_moments(case, point, state)[0], v, case.tol)


def wide_bases(kind, case, point, z, moment):
    """Return the bases in which a step computes: of Algorithm 1 or of the K-steps."""
    core, factors = case.pull(point)
    ends = reference.k_steps(core, factors, z, 0.3)
    if kind == "unconventional":
        return [reference.orth(k) for k in ends]
    if kind == "tdlrt":
        ends = reference.augmented_bases(core, factors, z)
    stacks = zip(factors, ends, case.pull(moment)[1], strict=True)
    return [reference.orth(np.concatenate(stack, axis=1)) for stack in stacks]


@pytest.mark.parametrize("kind", ["tdlrt", "tangent", "standard", "unconventional"])
@given(data=st.data())
def test_heavy_ball_in_moving_bases_is_dense_and_projected(backend, data, kind):
    # The velocity V is tangent at W, is kept by bases that hold its directions, and is projected
    # on the tangent space at the truncated tensor: V <- P(W') (beta V + force).
    case = data.draw(cases(backend, dtypes=["float64"]))
    point = case.point()
    objective, gradient = quadratic(case, case.normal(*case.shape, stream=42))
    moment = gt.project(point, case.array(case.normal(*case.shape, stream=43)))
    w, v = case.dense(point), case.tangent(point, moment)
    integrator = {
        "tdlrt": gt.TDLRT(0.3, gt.HeavyBall(0.6)),
        "tangent": gt.Tangent(0.3, gt.HeavyBall(0.6)),
        "standard": gt.Standard(0.3, gt.HeavyBall(0.6)),
        "unconventional": gt.Standard(0.3, gt.HeavyBall(0.6), augmented=False),
    }[kind]
    if kind == "tangent":
        force = reference.project(*case.pull(point), gradient(w))
    else:
        bases = wide_bases(kind, case, point, gradient(w), moment)
        w, v = reference.seen_through(w, bases), reference.seen_through(v, bases)
        force = reference.seen_through(gradient(w), bases)
    v = 0.6 * v + force
    w = w - 0.3 * v
    whole, least = gt.Tolerance(1e-11), feasible([max(r - 1, 1) for r in case.ranks])
    state = gt.State(5, (moment,))
    for rule in (whole, case.ranks, least):
        end, after, _ = step(integrator, point, objective, rule, state)
        expected = reference.project(*case.pull(end), v)
        (got,) = ambient_moments(case, end, after)
        assert_close(got, expected, 1e-9, np.linalg.norm(v))
        assert after.step == 6
        if rule is whole:
            assert_close(case.dense(end), w, 1e-9)


@pytest.mark.parametrize("integrator", [gt.TDLRT, gt.Tangent, gt.Standard])
@pytest.mark.parametrize("shape", [(20, 20), (12, 10, 8)])
def test_momentum_moves_the_bases_too(integrator, shape):
    # From bases that do not hold the target, heavy ball at fixed rank keeps pace with the dense
    # one. With momentum for the core only, the bases would move at a tenth of its speed.
    ranks = (2,) * len(shape)
    target, noise = (gt.testing.random_point(shape, ranks, seed=seed) for seed in (10, 0))
    near = gt.add(gt.scale(target, 1.0 / gt.norm(target)), gt.scale(noise, 0.1 / gt.norm(noise)))
    a, start = gt.to_dense(target) / gt.norm(target), gt.round(near, 2)

    def objective(w):
        residual = gt.to_dense(w) - a
        return float(np.sum(residual**2)) / 2, residual

    w, v = gt.to_dense(start), 0.0
    for _ in range(60):
        v = 0.9 * v + (w - a)
        w = w - 0.02 * v
    dense = np.sum((w - a) ** 2) / 2
    method = integrator(0.02, gt.HeavyBall(0.9))

    def loss(keep):
        point, state = start, method.init(start)
        for _ in range(60):
            point, state, _ = method.step(point, objective, state, gt.Fixed(2))
            (moment,) = state.moments
            parts = tuple(keep * k for k in moment.factors)
            state = state._replace(moments=(gt.TuckerTangent(moment.core, parts),))
        return objective(point)[0]

    assert loss(1.0) < 1.5 * dense
    assert loss(0.0) > 1e3 * dense
