"""An independent dense reference in NumPy and float64: slow, plain, and without geotucker.

Tensors are full arrays, bases come from SVDs, and the tangent space is an explicit matrix, so
that it shares neither code nor tricks (QR gauges, K-velocities) with what it checks.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Dense = np.ndarray
Gradient = Callable[[Dense], Dense]


def unfold(tensor: Dense, mode: int) -> Dense:
    """Mat_i: row a holds the entries whose index in `mode` is a, the others in C order."""
    rows = [np.take(tensor, a, axis=mode).ravel() for a in range(tensor.shape[mode])]
    return np.stack(rows)


def reconstruct(core: Dense, factors: Sequence[Dense]) -> Dense:
    """Tucker reconstruction in one einsum."""
    order = len(factors)
    operands: list = [np.asarray(core, np.float64), list(range(order))]
    for mode, factor in enumerate(factors):
        operands += [np.asarray(factor, np.float64), [order + mode, mode]]
    return np.einsum(*operands, list(range(order, 2 * order)), optimize=True)


def transform(tensor: Dense, matrices: Sequence[Dense | None]) -> Dense:
    """Apply a matrix to each mode; None leaves a mode as it is."""
    full = [np.eye(n) if m is None else m for n, m in zip(tensor.shape, matrices, strict=True)]
    return reconstruct(tensor, full)


def orth(matrix: Dense, threshold: float = 1e-11) -> Dense:
    """Orthonormal basis of the column space by SVD, columns scaled first."""
    scale = np.linalg.norm(matrix, axis=0)
    u, s, _ = np.linalg.svd(matrix / np.where(scale > 0, scale, 1.0), full_matrices=False)
    return u[:, s > threshold * max(s[0], 1e-300)]


def seen_through(tensor: Dense, bases: Sequence[Dense]) -> Dense:
    """Project every mode on the span of a basis: ``tensor x_i B_i B_i^T``."""
    return transform(tensor, [b @ b.T for b in bases])


def leading(tensor: Dense, ranks: Sequence[int]) -> list[Dense]:
    """Leading left singular vectors of every unfolding."""
    vectors = [np.linalg.svd(unfold(tensor, i))[0] for i in range(tensor.ndim)]
    return [u[:, :r] for u, r in zip(vectors, ranks, strict=True)]


def truncate(tensor: Dense, ranks: Sequence[int]) -> Dense:
    """HOSVD truncation of a full tensor."""
    return seen_through(tensor, leading(tensor, ranks))


def tails(tensor: Dense, ranks: Sequence[int]) -> list[float]:
    """Per mode, the norm of the singular values behind the rank."""
    spectra = [np.linalg.svd(unfold(tensor, i), compute_uv=False) for i in range(tensor.ndim)]
    return [float(np.linalg.norm(s[r:])) for s, r in zip(spectra, ranks, strict=True)]


def tangent_basis(core: Dense, factors: Sequence[Dense]) -> Dense:
    """Orthonormal basis of the tangent space, as columns, from the curves through the point.

    All derivatives of ``C x_i U_i``: each entry of the core and each entry of each factor moved
    alone. Only for cores that are not nearly rank-deficient.
    """
    columns = [reconstruct(unit, factors).ravel() for unit in _units(core.shape)]
    for mode, factor in enumerate(factors):
        for unit in _units(factor.shape):
            moved = [unit if i == mode else u for i, u in enumerate(factors)]
            columns.append(reconstruct(core, moved).ravel())
    return orth(np.stack(columns, axis=1))


def _units(shape: Sequence[int]) -> list[Dense]:
    return list(np.eye(math.prod(shape)).reshape(-1, *shape))


def project(core: Dense, factors: Sequence[Dense], ambient: Dense) -> Dense:
    """Project an ambient tensor orthogonally on the tangent space."""
    basis = tangent_basis(core, factors)
    return (basis @ (basis.T @ ambient.ravel())).reshape(ambient.shape)


def project_at(tensor: Dense, ranks: Sequence[int], ambient: Dense) -> Dense:
    """Project on the tangent space at a full tensor of the given multilinear rank.

    ``P Z = Z x_i A_i + sum_i Z x_i (I - A_i) (row space of Mat_i(W))``, A_i the projector of
    mode i. The row spaces come from an SVD, so that tiny singular values do no harm.
    """
    total = seen_through(ambient, leading(tensor, ranks))
    for mode, rank in enumerate(ranks):
        u, _, vt = np.linalg.svd(unfold(tensor, mode), full_matrices=False)
        u, v = u[:, :rank], vt[:rank].T
        z = unfold(ambient, mode)
        part = (z - u @ (u.T @ z)) @ v @ v.T
        moved = np.moveaxis(tensor, mode, 0).shape
        total = total + np.moveaxis(part.reshape(moved), 0, mode)
    return total


def flow(tensor: Dense, ranks: Sequence[int], gradient: Gradient, time: float, n: int) -> Dense:
    """Projected gradient flow ``dW/dt = -P(W) grad L(W)`` by n midpoint steps."""
    h = time / n
    for _ in range(n):
        slope = project_at(tensor, ranks, gradient(tensor))
        middle = truncate(tensor - h / 2 * slope, ranks)
        slope = project_at(middle, ranks, gradient(middle))
        tensor = truncate(tensor - h * slope, ranks)
    return tensor


def right_space(core: Dense, mode: int) -> tuple[Dense, Dense]:
    """Q_i and S_i with ``Mat_i(C)^T = Q_i S_i^T``, Q_i orthonormal, by SVD."""
    u, s, vt = np.linalg.svd(unfold(core, mode), full_matrices=False)
    return vt.T, u * s


def mode_gradient(ambient: Dense, factors: Sequence[Dense], mode: int) -> Dense:
    """G_i = Mat_i(Z x_{j != i} U_j^T)."""
    matrices = [None if j == mode else u.T for j, u in enumerate(factors)]
    return unfold(transform(ambient, matrices), mode)


def k_steps(
    core: Dense, factors: Sequence[Dense], ambient: Dense, lr: float
) -> list[Dense]:  # shapes (n_i, r_i)
    """K_i(1) of Theorem 2.1 by one Euler step: ``U_i S_i - lr G_i Q_i``."""
    ends = []
    for mode, u in enumerate(factors):
        q, s = right_space(core, mode)
        ends.append(u @ s - lr * mode_gradient(ambient, factors, mode) @ q)
    return ends


def augmented_bases(core: Dense, factors: Sequence[Dense], ambient: Dense) -> list[Dense]:
    """``orth[U_i | grad_{U_i} L]`` of Algorithm 1, ``grad_{U_i} L = G_i Mat_i(C)^T``."""
    bases = []
    for mode, u in enumerate(factors):
        gradient = mode_gradient(ambient, factors, mode) @ unfold(core, mode).T
        bases.append(orth(np.concatenate([u, gradient - u @ (u.T @ gradient)], axis=1)))
    return bases
