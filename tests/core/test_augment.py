"""Extended bases: orthonormal to rounding, whatever the new directions are."""

import numpy as np
import pytest

import geotucker as gt
from geotucker import _geometry
from geotucker._geometry import extend, gauge

from . import reference
from .cases import Case, assert_close

DTYPES = ["float64", "float32"]
N, R = 12, 3
# At the ends of the range of exponents. JAX takes subnormal numbers for 0.
HUGE = {"float64": 1.5e308, "float32": 3e38}
TINY = {"float64": 1e-307, "float32": 1e-37}
TINY_TO_JAX = {"float64": 1e-303, "float32": 1e-33}


def orthonormal(case, columns, stream=0):
    return np.linalg.qr(case.normal(N, columns, stream=stream))[0]


def kinds(case):
    """Return (basis, directions, what the new basis must contain) by name."""
    u, d = orthonormal(case, R), case.normal(N, 4, stream=1)
    d = d / np.abs(d).max(axis=0)
    outside = d - u @ (u.T @ d)
    small = np.sqrt(case.eps)
    unit = np.eye(N)
    inside = u @ case.normal(R, 4, stream=2)
    half = np.concatenate([d[:, :2], inside[:, :2]], axis=1)
    jax = case.backend is not None and case.backend.name == "jax"
    huge = HUGE[case.dtype]
    tiny = (TINY_TO_JAX if jax else TINY)[case.dtype]
    along = np.sign(u[:, :1]) * (0.5 + 0.5 * np.abs(d))  # its product with u is larger than 1
    square = np.linalg.qr(case.normal(N, N))[0]
    drift = 300 * case.eps * case.normal(N, N, stream=3)
    return {
        "ordinary": (u, d, d),
        "in the span": (u, inside, None),
        "nearly in the span": (u, inside + small * outside, outside),
        "some in the span": (u, half, d[:, :2]),
        "zero": (u, 0 * d, None),
        "some zero": (u, d * [1, 0, 1, 0], d[:, ::2]),
        "equal": (u, d[:, [0, 0, 0, 0]], d[:, :1]),
        "nearly equal": (u, d[:, [0, 0, 0, 0]] + small * d, d),
        "huge": (u, along * huge, along),
        "tiny": (u, d * tiny, d),
        "all scales": (u, d * [huge, 1.0, tiny, 0.0], d[:, :3]),
        "unit vectors": (unit[:, :R], unit[:, R : R + 4], unit[:, R : R + 4]),
        "unit vectors again": (unit[:, :R], unit[:, :4], unit[:, R : R + 1]),
        "unit basis": (unit[:, 4 : 4 + R], d, d),
        "drifted basis": (u + drift[:, :R], d, d),
        "drifted and in the span": (u + drift[:, :R], inside, None),
        "square": (square, d, None),
        "drifted square": (square + drift, d, None),
        "more than there is room for": (u, case.normal(N, N, stream=4), unit),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", kinds(Case(None, "float64", (N,), (1,), 0)))
def test_extended_bases_are_orthonormal(backend, dtype, kind):
    case = Case(backend, dtype, (N,), (1,), 0)
    basis, directions, wanted = kinds(case)[kind]
    basis = case.array(basis)
    (extended,) = extend([(basis, case.array(directions))])
    assert extended is not None
    wide, head = extended
    head = case.array(np.eye(basis.shape[1])) if head is None else head
    assert backend.numpy(wide).dtype == backend.numpy(head).dtype == dtype
    q, head = (backend.numpy(array).astype(np.float64) for array in (wide, head))
    basis = backend.numpy(basis).astype(np.float64)
    r, m = basis.shape[1], min(N, basis.shape[1] + directions.shape[1])
    assert q.shape == (N, m)
    assert head.shape == (r, r)
    assert np.abs(q.T @ q - np.eye(m)).max() <= 5 * np.sqrt(N) * case.eps
    assert np.abs(q[:, :r] @ head - basis).max() <= 20 * case.eps
    # The basis leads, up to what it has drifted.
    drift = np.abs(basis.T @ basis - np.eye(r)).max()
    assert np.abs(q[:, :r] - basis).max() <= 20 * case.eps + drift
    if wanted is not None:
        near = kind.startswith("nearly")
        allowed = 1e3 * np.sqrt(case.eps) if near else case.tol
        assert_close(q @ (q.T @ wanted), wanted, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind",
    ["ordinary", "nearly in the span", "huge", "tiny", "unit vectors", "unit basis", "square"],
)
def test_the_basis_itself_is_not_decomposed_again(backend, dtype, kind, monkeypatch):
    # It is the larger part, and Householder's Q of all columns costs the more.
    def never(*args):
        raise AssertionError("the basis was decomposed again")

    monkeypatch.setattr(_geometry, "_decompose_whole", never)
    case = Case(backend, dtype, (N,), (1,), 0)
    basis, directions, _ = kinds(case)[kind]
    basis = case.array(basis)
    (extended,) = extend([(basis, case.array(directions))])
    assert extended is not None
    q, head = extended
    assert np.array_equal(backend.numpy(q)[:, : basis.shape[1]], backend.numpy(basis))
    assert head is None  # the identity: the core is only padded


@pytest.mark.parametrize("dtype", DTYPES)
def test_augmenting_for_long_keeps_bases_orthonormal(backend, dtype):
    # Each time from the last result: rounding must not add up.
    case = Case(backend, dtype, (N,), (1,), 0)
    basis = case.array(orthonormal(case, R))
    for number in range(200):
        mix = np.linalg.qr(case.normal(R + 2, R + 2, stream=100 + number))[0][:, :R]
        (extended,) = extend([(basis, case.array(case.normal(N, 2, stream=number)))])
        assert extended is not None
        q, _ = extended
        basis = q @ case.array(mix)
    full = backend.numpy(q).astype(np.float64)
    assert np.abs(full.T @ full - np.eye(R + 2)).max() <= 5 * np.sqrt(N) * case.eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smallest", [1.0, 1e-5, 0.0])
def test_gauge_needs_no_singular_value(backend, dtype, smallest):
    # Orthonormal rows at any rank, C = Ten_i(Q_i^T) x_i S_i, and a factor K_i = U_i S_i whose
    # gradient is that of Theorem 2.1.
    case = Case(backend, dtype, (6, 5, 4), (2, 3, 3), 0)
    core, factors = case.pull(case.point())
    scales = [np.append(np.ones(r - 1), smallest) for r in case.ranks]
    core = reference.transform(core, [np.diag(s) for s in scales])
    point = case.put(core, factors)
    z = case.normal(*case.shape, stream=3)
    for mode, u in enumerate(factors):
        gauged, s = (backend.numpy(array).astype(np.float64) for array in gauge(point.core, mode))
        rows = reference.unfold(gauged, mode)
        assert gauged.shape == case.ranks
        assert np.abs(rows @ rows.T - np.eye(len(rows))).max() <= 20 * case.eps
        scaled = [s if j == mode else None for j in range(3)]
        assert_close(reference.transform(gauged, scaled), core, 20 * case.eps)
        k = reference.mode_gradient(z, factors, mode) @ rows.T
        moving = case.pull(gt.project(point, case.array(z)))[1][mode]
        assert_close(k - u @ (u.T @ k), moving, case.tol)


def test_gauge_at_ranks_that_no_tensor_has(backend):
    case = Case(backend, "float64", (5, 4), (3, 1), 0)
    core = case.point().core
    gauged, s = gauge(core, 0)
    assert gauged.shape == (1, 1)
    assert_close(backend.numpy(s @ gauged), backend.numpy(core), 1e-14)
