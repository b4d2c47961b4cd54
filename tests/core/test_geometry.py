"""The manifold of fixed multilinear rank, against the dense projector and by its definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt

from . import reference
from .cases import Case, assert_close, assert_orthonormal, cases, feasible


class Sparse:
    """Entries at given places: a gradient that knows nothing but how to contract itself."""

    def __init__(self, case, tensor):
        self.case, self.tensor = case, tensor

    def contract(self, factors, skip):
        matrices = [
            None if mode == skip else self.case.backend.numpy(u).astype(np.float64).T
            for mode, u in enumerate(factors)
        ]
        return self.case.array(reference.transform(self.tensor, matrices))


def ambient(case, stream=3):
    """Return an ambient tensor for the reference, and as an array."""
    z = case.normal(*case.shape, stream=stream)
    return z, case.array(z)


@given(data=st.data())
def test_projection_is_the_nearest_tangent_vector(backend, data):
    case = data.draw(cases(backend))
    point, (z, array) = case.point(), ambient(case)
    tangent = gt.project(point, array)
    expected = reference.project(*case.pull(point), z)
    size = np.linalg.norm(z)
    assert_close(case.tangent(point, tangent), expected, case.tol, size)
    as_point = gt.tangent_to_point(point, tangent)
    assert_close(case.dense(as_point), expected, case.tol, size)
    doubled = [2 * rank for rank in point.ranks]
    assert all(rank <= most for rank, most in zip(as_point.ranks, doubled, strict=True))


@given(data=st.data())
def test_projection_satisfies_the_tangent_conditions(backend, data):
    case = data.draw(cases(backend))
    point, (z, array) = case.point(), ambient(case)
    core, ks = case.pull(gt.project(point, array))
    factors = case.pull(point)[1]
    assert_close(core, reference.transform(z, [u.T for u in factors]), case.tol)
    for u, k in zip(factors, ks, strict=True):
        assert k.shape == u.shape
        assert np.abs(u.T @ k).max() <= 50 * case.eps * np.linalg.norm(z)


@given(data=st.data())
def test_projection_is_idempotent_and_self_adjoint(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    (y, array_y), (z, array_z) = ambient(case), ambient(case, 4)
    py, pz = gt.project(point, array_y), gt.project(point, array_z)
    dense_py, dense_pz = case.tangent(point, py), case.tangent(point, pz)
    size = np.linalg.norm(y) * np.linalg.norm(z)
    again = gt.project(point, gt.tangent_to_point(point, py))
    assert_close(case.tangent(point, again), dense_py, case.tol, np.linalg.norm(y))
    assert abs(np.sum(dense_py * z) - np.sum(y * dense_pz)) <= case.tol * size
    itself = case.dense(point)  # W is tangent at W
    assert_close(case.tangent(point, gt.project(point, point)), itself, case.tol)


@given(data=st.data())
def test_inner_product_of_coordinates_is_the_ambient_one(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    a, b = (gt.project(point, ambient(case, stream)[1]) for stream in (3, 4))
    dense_a, dense_b = case.tangent(point, a), case.tangent(point, b)
    size = np.linalg.norm(dense_a) * np.linalg.norm(dense_b)
    assert abs(gt.inner_tangent(a, b) - np.sum(dense_a * dense_b)) <= case.tol * size
    assert abs(gt.inner_tangent(a, a) - np.sum(dense_a**2)) <= case.tol * np.sum(dense_a**2)


@given(data=st.data())
def test_a_gradient_may_be_dense_factored_or_contractable(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    gradient = case.point(1, feasible([min(2, n) for n in case.shape]))
    z = case.dense(gradient)
    expected = reference.project(*case.pull(point), z)
    for form in (gradient, (gradient.core, list(gradient.factors)), case.array(z), Sparse(case, z)):
        tangent = gt.project(point, form)
        assert_close(case.tangent(point, tangent), expected, case.tol, np.linalg.norm(z))


@given(data=st.data())
def test_augment_keeps_the_tensor_and_the_bases(backend, data):
    case = data.draw(cases(backend))
    point, columns = case.point(), data.draw(st.integers(1, 3)) if case.seed else 2
    directions = [case.normal(n, columns, stream=20 + n) for n in case.shape]
    wide = gt.augment(point, [case.array(10.0 ** (3 * case.seed % 7) * d) for d in directions])
    assert_orthonormal(case, wide, 20)
    assert_close(case.dense(wide), case.dense(point), case.tol)
    (core, factors), (_, wider) = case.pull(point), case.pull(wide)
    for u, v, d, n in zip(factors, wider, directions, case.shape, strict=True):
        rank = u.shape[1]
        assert v.shape[1] == min(n, rank + columns)
        assert_close(v[:, :rank], u, 50 * case.eps)
        taken = d[:, : n - rank]  # more directions than there is room for are left out
        assert_close(v @ (v.T @ taken), taken, 1e2 * case.tol, np.linalg.norm(d))
    padded = np.zeros(wide.ranks)
    padded[tuple(slice(r) for r in core.shape)] = core
    assert_close(case.pull(wide)[0], padded, 50 * case.eps)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("kind", ["zero", "old", "equal", "huge", "tiny", "mixed"])
def test_augment_by_degenerate_directions(backend, dtype, kind):
    case = Case(backend, dtype, (6, 5), (2, 2), 1)
    point = case.point()
    big, small = (
        (1e300, 1e-300) if dtype == "float64" else (1e37, 1e-35)
    )  # JAX takes subnormal numbers for 0
    directions = []
    for u, n in zip(case.pull(point)[1], case.shape, strict=True):
        d = case.normal(n, 2, stream=30 + n)
        directions.append(
            {
                "zero": 0 * d,
                "old": u,
                "equal": d[:, [0, 0]],
                "huge": d * big,
                "tiny": d * small,
                "mixed": d * [big, small],
            }[kind]
        )
    wide = gt.augment(point, [case.array(d) for d in directions])
    assert_orthonormal(case, wide, 20)
    assert wide.ranks == (4, 4)
    assert_close(case.dense(wide), case.dense(point), 50 * case.eps)
    if kind in ("huge", "tiny", "mixed"):
        for v, d in zip(case.pull(wide)[1], directions, strict=True):
            d = d / np.abs(d).max(axis=0)
            assert_close(v @ (v.T @ d), d, case.tol)


@given(data=st.data())
def test_retraction_is_of_first_order(backend, data):
    case = data.draw(cases(backend, min_order=2, dtypes=["float64"]))
    point = case.point()
    core, _ = case.pull(point)
    smallest = min(
        np.linalg.svd(reference.unfold(core, i), compute_uv=False)[-1] for i in range(core.ndim)
    )
    tangent = gt.project(point, ambient(case)[1])
    unit = 0.1 * smallest / np.sqrt(gt.inner_tangent(tangent, tangent))
    errors = []
    for t in (unit, unit / 8):
        small = gt.TuckerTangent(t * tangent.core, tuple(t * k for k in tangent.factors))
        moved = gt.retract(point, small)
        assert_orthonormal(case, moved)
        assert moved.ranks == case.ranks
        straight = case.dense(point) + t * case.tangent(point, tangent)
        errors.append(np.linalg.norm(case.dense(moved) - straight) / np.linalg.norm(core))
    # Quadratic: 64 times smaller (rounding aside; the error vanishes on linear manifolds).
    assert errors[1] <= errors[0] / 32 + 1e-13
    assert errors[0] <= 0.1


@given(data=st.data())
def test_retraction_truncates_the_moved_tensor(backend, data):
    case = data.draw(cases(backend, dtypes=["float64"]))
    point = case.point()
    tangent = gt.project(point, ambient(case)[1])
    straight = case.dense(point) + case.tangent(point, tangent)
    whole = gt.retract(point, tangent, gt.Tolerance(0.0))
    assert_close(case.dense(whole), straight, case.tol)
    expected = reference.truncate(straight, case.ranks)
    assert_close(case.dense(gt.retract(point, tangent)), expected, 1e-8)
    least = (1,) * len(case.shape)
    expected = reference.truncate(straight, least)
    assert_close(case.dense(gt.retract(point, tangent, 1)), expected, 1e-8)


@given(data=st.data())
def test_transport_projects_at_the_target(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    other = feasible(data.draw(st.tuples(*(st.integers(1, r) for r in case.ranks))))
    target = case.point(1, other if case.seed else None)
    tangent = gt.project(point, ambient(case)[1])
    moved = gt.transport(point, tangent, target)
    full = case.tangent(point, tangent)
    expected = reference.project(*case.pull(target), full)
    assert_close(case.tangent(target, moved), expected, case.tol, np.linalg.norm(full))
    longest = gt.inner_tangent(tangent, tangent) * (1 + case.tol)
    assert gt.inner_tangent(moved, moved) <= longest
    stayed = gt.transport(point, tangent, point)
    assert_close(case.tangent(point, stayed), full, case.tol)


def test_ranks_that_no_tensor_has(backend):
    # A core of shape (3, 1) is a valid pair, though W has rank 1. Its one row, C = c e^T, lets
    # the second basis move along c only.
    case = Case(backend, "float64", (5, 4), (3, 1), 0)
    point, (z, array) = case.point(), ambient(case)
    tangent = gt.project(point, array)
    core, (u, v) = case.pull(point)
    q = u @ core / np.linalg.norm(core)
    expected = z @ v @ v.T + q @ q.T @ z @ (np.eye(4) - v @ v.T)
    assert_close(case.dense(gt.tangent_to_point(point, tangent)), expected, 1e-12)
    whole = gt.retract(point, tangent, gt.Tolerance(1e-12))
    assert_close(case.dense(whole), case.dense(point) + expected, 1e-12)
    assert gt.retract(point, tangent).ranks == (1, 1)
