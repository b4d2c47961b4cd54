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
    # (C x_i O_i^T, U_i O_i) is the same tensor, and momentum turns with the core.
    case = data.draw(cases(backend, dtypes=["float64"]))
    integrator = integrator(0.2, scheme, **settings)
    objective, _ = quadratic(case, case.normal(*case.shape, stream=42))
    core, factors = case.pull(case.point())
    moments = [case.normal(*case.ranks, stream=43)] * len(integrator.init(case.point()).moments)
    o = rotations(case)
    turned = case.put(
        reference.transform(core, [m.T for m in o]),
        [u @ m for u, m in zip(factors, o, strict=True)],
    )
    starts = [(case.point(), moments), (turned, [turned_by(m, o) for m in moments])]
    ends = []
    for point, start in starts:
        state = gt.State(0, tuple(case.array(m) for m in start))
        for _ in range(2):
            point, state, _ = step(integrator, point, objective, case.ranks, state)
        ends.append([case.dense(point)])
        ends[-1] += [case.dense((m, point.factors)) for m in state.moments]
    for got, expected in zip(*ends, strict=True):
        assert_close(got, expected, 1e-7)


def turned_by(moment, o):
    return reference.transform(moment, [m.T for m in o])


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
        assert_close(case.dense((state.moments[0], point.factors)), v, case.tol)


def velocity_bases(kind, case, point, gradient):
    core, factors = case.pull(point)
    z = gradient(case.dense(point))
    if kind == "tdlrt":
        return reference.augmented_bases(core, factors, z)
    return [reference.orth(k) for k in reference.k_steps(core, factors, z, 0.3)]


def widest(kind, case):
    """Return the ranks of the augmented bases; where W cannot have them, the rule keeps less."""
    times = 1 if kind == "unconventional" else 2
    return tuple(min(times * r, n) for r, n in zip(case.ranks, case.shape, strict=True))


@pytest.mark.parametrize("kind", ["tdlrt", "tangent", "unconventional"])
@given(data=st.data())
def test_heavy_ball_in_moving_bases_is_dense_and_projected(backend, data, kind):
    # The velocity V lives in the old bases, is kept by wider ones, and is projected on the bases
    # that survive the truncation: V <- V seen through U_i(new).
    case = data.draw(cases(backend, dtypes=["float64"]))
    point = case.point()
    objective, gradient = quadratic(case, case.normal(*case.shape, stream=42))
    moment = case.array(case.normal(*case.ranks, stream=43))
    w, v = case.dense(point), case.dense((moment, point.factors))
    if kind == "tangent":
        integrator = gt.Tangent(0.3, gt.HeavyBall(0.6))
        force = reference.project(*case.pull(point), gradient(w))
    else:
        bases = velocity_bases(kind, case, point, gradient)
        if kind == "tdlrt":
            integrator = gt.TDLRT(0.3, gt.HeavyBall(0.6))
        else:
            integrator = gt.Standard(0.3, gt.HeavyBall(0.6), augmented=False)
            w, v = reference.seen_through(w, bases), reference.seen_through(v, bases)
        force = reference.seen_through(gradient(w), bases)
    v = 0.6 * v + force
    w = w - 0.3 * v
    least = feasible([max(r - 1, 1) for r in case.ranks])
    state = gt.State(5, (moment,))
    for rule in (keep_all, least):
        end, after, _ = step(integrator, point, objective, rule, state)
        kept = reference.seen_through(v, case.pull(end)[1])
        assert_close(case.dense((after.moments[0], end.factors)), kept, 1e-10)
        assert after.step == 6
        if rule is keep_all:
            assert_close(case.dense(end), w, 1e-10)
        if rule is keep_all and end.ranks == widest(kind, case):
            assert_close(kept, v, 1e-10)
