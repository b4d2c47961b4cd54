"""HOSVD, rounding and truncation: error bounds, orthonormality, exactness."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt

from . import reference
from .cases import Case, assert_close, assert_orthonormal, cases, keep_all, taus


def decaying(case, rate=0.5):
    """Return a full tensor whose singular values decay in every mode."""
    tensor = case.normal(*case.shape, stream=7)
    for mode, n in enumerate(case.shape):
        basis = np.linalg.qr(case.normal(n, n, stream=8 + mode))[0]
        matrices = [None] * len(case.shape)
        matrices[mode] = basis * rate ** np.arange(n)
        tensor = reference.transform(tensor, matrices)
    return tensor.astype(case.dtype).astype(np.float64)


@given(data=st.data())
def test_tolerance_bounds_the_error(backend, data):
    case, tau = data.draw(cases(backend)), data.draw(taus(backend))
    tensor = decaying(case)
    allowed = tau * np.linalg.norm(tensor) * (1 + case.tol)
    whole = gt.hosvd(case.array(tensor), keep_all)
    for point in (
        gt.hosvd(case.array(tensor), gt.Tolerance(tau)),
        gt.st_hosvd(case.array(tensor), gt.Tolerance(tau)),
        gt.round(gt.add(whole, gt.scale(whole, 0.0)), gt.Tolerance(tau)),
    ):
        assert np.linalg.norm(case.dense(point) - tensor) <= allowed
        assert_orthonormal(case, point)
        assert point.ranks == tuple(u.shape[1] for u in point.factors)


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_every_mode_gets_its_share_of_the_tolerance_only(backend, order):
    # One small direction in each mode: cutting all of them, each within tau ||W||, breaks the
    # bound. Each mode's tail is just above tau ||W|| / sqrt(d), so nothing may be cut.
    tensor = np.zeros((2,) * order)
    tensor[(0,) * order] = 1.0
    for mode in range(order):
        tensor[tuple(int(i == mode) for i in range(order))] = 1e-2
    case = Case(backend, "float64", (2,) * order, (2,) * order, 0)
    tail = reference.tails(tensor, (1,) * order)[0]
    tau = 0.98 * math.sqrt(order) * tail / np.linalg.norm(tensor)
    for decompose in (gt.hosvd, gt.st_hosvd, lambda x, rule: gt.round(gt.hosvd(x, 2), rule)):
        point = decompose(case.array(tensor), gt.Tolerance(tau))
        assert np.linalg.norm(case.dense(point) - tensor) <= tau * np.linalg.norm(tensor)
        assert point.ranks == (2,) * order


@given(data=st.data())
def test_tolerance_keeps_the_smallest_ranks(backend, data):
    case, tau = data.draw(cases(backend, dtypes=["float64"])), data.draw(taus(backend))
    tensor = decaying(case)
    share = tau * np.linalg.norm(tensor) / math.sqrt(tensor.ndim)
    point = gt.hosvd(case.array(tensor), gt.Tolerance(tau))
    for mode, rank in enumerate(point.ranks):
        ranks = [rank - 1 if i == mode else n for i, n in enumerate(tensor.shape)]
        assert rank == 1 or reference.tails(tensor, ranks)[mode] > share * (1 - case.tol)


@given(data=st.data())
def test_fixed_ranks_are_quasi_optimal(backend, data):
    case = data.draw(cases(backend))
    exact, noise = case.dense(case.point()), 0.1 * case.normal(*case.shape, stream=9)
    tensor = (exact + noise).astype(case.dtype).astype(np.float64)
    best_is_at_most = np.linalg.norm(tensor - exact)
    tails = reference.tails(tensor, case.ranks)
    for decompose in (gt.hosvd, gt.st_hosvd):
        point = decompose(case.array(tensor), case.ranks)
        error = np.linalg.norm(case.dense(point) - tensor)
        slack = case.tol * np.linalg.norm(tensor)
        assert point.ranks == case.ranks
        assert error <= math.hypot(*tails) + slack
        assert error <= math.sqrt(tensor.ndim) * best_is_at_most + slack


@given(data=st.data())
def test_a_tensor_of_low_rank_is_found_exactly(backend, data):
    case = data.draw(cases(backend))
    tensor = case.dense(case.point())
    for decompose in (gt.hosvd, gt.st_hosvd):
        point = decompose(case.array(tensor), gt.Tolerance(1e-2 * case.tol))
        assert_close(case.dense(point), tensor, case.tol)
        assert all(r <= s for r, s in zip(point.ranks, case.ranks, strict=True))


@given(data=st.data())
def test_hosvd_is_the_hosvd(backend, data):
    case = data.draw(cases(backend))
    tensor = decaying(case, 0.9)
    point = gt.hosvd(case.array(tensor), case.ranks)
    assert_close(case.dense(point), reference.truncate(tensor, point.ranks), 10 * case.tol)
    whole = gt.hosvd(case.array(tensor), keep_all)
    for mode in range(tensor.ndim):  # all-orthogonal core, rows descending
        rows = reference.unfold(case.pull(whole)[0], mode)
        gram, norms = rows @ rows.T, np.linalg.norm(rows, axis=1)
        assert np.abs(gram - np.diag(norms**2)).max() <= case.tol * norms[0] ** 2
        assert np.all(np.diff(norms) <= case.tol * norms[0])


@given(data=st.data())
def test_st_hosvd_cuts_mode_after_mode(backend, data):
    case = data.draw(cases(backend))
    tensor = case.normal(*case.shape, stream=7)
    core, factors = tensor, []
    for mode, rank in enumerate(case.ranks):
        factors.append(np.linalg.svd(reference.unfold(core, mode))[0][:, :rank])
        turn = [u.T if i == mode else None for i, u in enumerate([None] * mode + [factors[-1]])]
        core = reference.transform(core, turn + [None] * (tensor.ndim - mode - 1))
    expected = reference.reconstruct(core, factors)
    point = gt.st_hosvd(case.array(tensor), case.ranks)
    slack = 1e-8 if case.dtype == "float64" else 0.02  # singular values may lie close together
    assert_close(case.dense(point), expected, slack, np.linalg.norm(tensor))


@given(data=st.data(), deficient=st.booleans(), wide=st.booleans())
def test_orthonormalise_keeps_the_tensor(backend, data, deficient, wide):
    case = data.draw(cases(backend))
    ranks = [n + 1 for n in case.shape] if wide else case.ranks
    pairs = zip(case.shape, ranks, strict=True)
    factors = [case.normal(n, r, stream=i) for i, (n, r) in enumerate(pairs)]
    if deficient:
        factors = [u[:, :1] * np.arange(u.shape[1]) for u in factors]  # one column is zero
    pair = case.put(case.normal(*ranks, stream=9), factors)
    point = gt.orthonormalise(pair)
    assert_orthonormal(case, point)
    size = math.prod(np.linalg.norm(u) for u in factors) * np.linalg.norm(case.pull(pair)[0])
    assert_close(case.dense(point), case.dense(pair), 1e-2 * case.tol, size)
    assert point.ranks == tuple(min(n, r) for n, r in zip(case.shape, ranks, strict=True))


@given(data=st.data())
def test_truncation_says_what_it_did(backend, data):
    case, tau = data.draw(cases(backend)), data.draw(taus(backend))
    point = case.point()
    (cut,) = gt.truncate([point], gt.Tolerance(tau))
    core, factors = case.pull(point)
    rotations = [backend.numpy(p).astype(np.float64) for p in cut.rotations]
    for p, u, v in zip(rotations, factors, case.pull(cut.point)[1], strict=True):
        assert np.abs(p.T @ p - np.eye(p.shape[1])).max() <= 50 * case.eps
        assert_close(v, u @ p, case.tol)
    turned = reference.transform(core, [p.T for p in rotations])
    assert_close(case.pull(cut.point)[0], turned, case.tol)
    error = np.linalg.norm(case.dense(cut.point) - case.dense(point))
    size = np.linalg.norm(core)
    assert error <= cut.error_bound + case.tol * size
    assert cut.error_bound <= (tau + case.tol) * size
    expected = math.hypot(*reference.tails(core, cut.point.ranks))
    assert math.isclose(cut.error_bound, expected, rel_tol=1e-2, abs_tol=case.tol * size)


@given(data=st.data())
def test_the_spectrum_is_that_of_the_dense_tensor(backend, data):
    case = data.draw(cases(backend))
    point = case.point()
    dense, spectrum = case.dense(point), gt.spectrum(point)
    assert spectrum.shape == case.shape
    for mode, values in enumerate(spectrum.values):
        exact = np.linalg.svd(reference.unfold(dense, mode), compute_uv=False)
        assert values.dtype == np.float64
        assert len(values) == point.ranks[mode]
        assert_close(values, exact[: len(values)], case.tol)


def test_a_spectrum_of_nan_is_refused(backend):
    core = backend.array([[1.0, math.nan], [0.0, 1.0]])
    with pytest.raises(gt.NonFiniteError, match="core"):
        gt.spectrum((core, [core, core]))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_norm_beyond_the_dtype_is_refused(backend, dtype):
    # Entries are finite, singular values and cores would not be.
    largest = float(np.finfo(dtype).max)
    huge = backend.array(np.full((6, 5), 0.5 * largest), dtype)
    fits = backend.array(np.full((6, 5), 0.15 * largest), dtype)
    one = backend.array(np.ones((1, 1)), dtype)
    point = gt.TuckerPoint(one * backend.array(0.5 * largest, dtype), (4.0 * one, one))
    for call in (
        lambda tensor: gt.hosvd(tensor, 1),
        lambda tensor: gt.st_hosvd(tensor, gt.Tolerance(0.1)),
        lambda tensor: gt.spectrum((tensor, ())),
        lambda tensor: gt.truncate([gt.TuckerPoint(tensor, ())], keep_all),
    ):
        with pytest.raises(gt.NonFiniteError, match=f"expected a norm of at most .* of {dtype}"):
            call(huge)
    with pytest.raises(gt.NonFiniteError, match="core with orthonormal factors: expected"):
        gt.orthonormalise(point)
    assert np.isfinite(backend.numpy(gt.hosvd(fits, 1).core)).all()


def test_small_singular_values_survive_a_wide_unfolding(backend):
    # Through the Gram matrix they would drown at 1e-8.
    case = Case(backend, "float64", (3, 40), (3, 3), 0)
    u = np.linalg.qr(case.normal(3, 3))[0]
    v = np.linalg.qr(case.normal(40, 3, stream=1))[0]
    tensor = case.array((u * [1.0, 1e-6, 1e-12]) @ v.T)
    assert gt.hosvd(tensor, gt.Tolerance(1e-9)).ranks == (2, 2)
    assert gt.hosvd(tensor, gt.Tolerance(1e-13)).ranks == (3, 3)


@pytest.mark.parametrize("shape", [(5,), (5, 3, 4), (1, 2, 1, 2, 1)])
def test_zero_has_rank_one(backend, shape):
    for decompose in (gt.hosvd, gt.st_hosvd):
        point = decompose(backend.array(np.zeros(shape)), gt.Tolerance(0.1))
        assert point.ranks == (1,) * len(shape)
        assert not backend.numpy(gt.to_dense(point)).any()


def test_impossible_ranks_are_lowered(backend):
    tensor = np.random.default_rng(0).standard_normal((5, 3, 4))
    array = backend.array(tensor)
    for decompose in (gt.hosvd, gt.st_hosvd):
        # No tensor has multilinear rank (5, 1, 3): mode 0 sees a matrix of rank 3 only.
        point = decompose(array, (5, 1, 3))
        assert point.ranks == (3, 1, 3)
        gt.testing.check_orthonormal(point)
        assert decompose(array, (9, 9, 9)).ranks == (5, 3, 4)
    exact = reference.truncate(tensor, (5, 1, 3))
    got = backend.numpy(gt.to_dense(gt.hosvd(array, lambda spectra: [(5, 1, 3)])))
    assert_close(got, exact, 1e-12)  # lowering a rank loses nothing


def test_half_precision_is_decomposed_in_single(backend):
    half = {"numpy": "float16", "pytorch": "float32", "jax": "float16", "cupy": "float16"}
    array = backend.array(np.outer([1.0, 2.0], [1.0, 0.5, 0.25]), half[backend.name])
    if backend.name == "pytorch":
        array = array.bfloat16()
    point = gt.hosvd(array, 1)
    assert point.core.dtype == point.factors[1].dtype == array.dtype
    dense = gt.to_dense(point)
    dense = dense.float() if backend.name == "pytorch" else dense
    assert_close(backend.numpy(dense), np.outer([1.0, 2.0], [1.0, 0.5, 0.25]), 0.02)
