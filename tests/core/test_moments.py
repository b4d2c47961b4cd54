"""Moments through basis changes: exact where they can be, a documented choice where not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt
from geotucker._moments import lift, rotate

from . import reference
from .cases import assert_close, cases, keep_all, taus


@given(data=st.data())
def test_lift_and_rotate_keep_the_tensor_of_a_moment(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    moment = case.array(case.normal(*case.ranks, stream=5))
    tensor = case.dense((moment, point.factors))
    sides = enumerate(zip(case.shape, case.ranks, strict=True))
    directions = [case.normal(n, r, stream=20 + i) for i, (n, r) in sides]
    wide = gt.augment(point, [case.array(d) for d in directions])
    lifted = lift(moment, wide.ranks)
    assert_close(case.dense((lifted, wide.factors)), tensor, case.tol)
    (turned,) = gt.truncate([wide], keep_all)  # a rotation: nothing is cut
    rotated = rotate(lifted, turned.rotations)
    assert_close(case.dense((rotated, turned.point.factors)), tensor, case.tol)
    (cut,) = gt.truncate([wide], gt.Tolerance(data.draw(taus(backend))))
    rotated = rotate(lifted, cut.rotations)
    projected = reference.seen_through(tensor, case.pull(cut.point)[1])
    assert_close(case.dense((rotated, cut.point.factors)), projected, case.tol, 1.0)


@given(data=st.data())
def test_second_moments_are_the_diagonal_of_the_rotated_matrix(backend, data):
    case = data.draw(cases(backend, max_order=3))
    second = case.normal(*case.ranks, stream=5) ** 2
    (cut,) = gt.truncate([case.point()], gt.Fixed(2))
    rotated = backend.numpy(rotate(case.array(second), cut.rotations, squared=True))
    whole = np.ones((1, 1))  # P_1 kron ... kron P_d
    for p in cut.rotations:
        whole = np.kron(whole, backend.numpy(p).astype(np.float64))
    expected = np.diag(whole.T @ np.diag(second.ravel()) @ whole).reshape(cut.point.ranks)
    assert_close(rotated, expected, case.tol)
    assert (rotated >= 0).all()


@given(data=st.data())
def test_a_scheme_may_have_several_moments(backend, data):
    # Adam-like bookkeeping with two moments that are both linear in the gradients.
    case = data.draw(cases(backend, min_order=2, dtypes=["float64"]))

    class Two:
        def init(self, core):
            return (core * 0, core * 0)

        def __call__(self, core, gradient, lr, moments):
            first, second = 0.5 * moments[0] + gradient, 0.25 * moments[1] - gradient
            return core - lr * first, (first, second)

    z = case.array(case.normal(*case.shape, stream=6))
    integrator = gt.TDLRT(0.1, Two())
    point, state = case.point(), integrator.init(case.point())
    for _ in range(2):
        point, state, _ = integrator.step(point, lambda w: (0.0, z), state, gt.Fixed(2))
    assert len(state.moments) == 2
    assert all(tuple(moment.shape) == point.ranks for moment in state.moments)
