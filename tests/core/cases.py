"""What the tests of the core draw and share: shapes with ranks, points, objectives, tolerances."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

import geotucker as gt

from . import reference

# Largest side per order: the reference forms projectors as matrices, so tensors stay small.
_SIDES = {1: 8, 2: 8, 3: 5, 4: 3, 5: 3}

# JAX and CuPy compile every operation for every shape and dtype, a second per algorithm and
# shape, so they get this short list; the other orders have a test of their own on all libraries
# (test_robustness.py). Modes with n_i < 2 r_i and n_i >= 2 r_i are in it.
_SHORT_LIST = [
    ("float64", (5, 3, 4), (2, 2, 3)),
    ("float32", (6, 5), (2, 2)),
]

ANY_SHAPE = ("numpy", "pytorch")

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


@dataclass(frozen=True)
class Case:
    """One drawn problem: an array library, a dtype, a shape with feasible ranks, a seed."""

    backend: Any
    dtype: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    seed: int

    def __repr__(self) -> str:
        return f"Case({self.backend.name}, {self.dtype}, {self.shape}, {self.ranks}, {self.seed})"

    @property
    def eps(self) -> float:
        return EPS[self.dtype]

    @property
    def tol(self) -> float:
        """Relative error that rounding may cause at moderate condition numbers."""
        return 1e4 * self.eps

    def array(self, values: Any) -> Any:
        return self.backend.array(values, self.dtype)

    def normal(self, *shape: int, stream: int = 0) -> np.ndarray:
        """Gaussian numbers that the dtype can hold, in float64; `stream` makes them differ."""
        rng = np.random.default_rng([self.seed, stream])
        return rng.standard_normal(shape).astype(self.dtype).astype(np.float64)

    def point(self, stream: int = 0, ranks: Sequence[int] | None = None) -> gt.TuckerPoint:
        """Random point with orthonormal factors."""
        ranks = self.ranks if ranks is None else ranks
        pairs = list(zip(self.shape, ranks, strict=True))
        factors = [
            np.linalg.qr(self.normal(n, r, stream=10 * stream + i + 1))[0]
            for i, (n, r) in enumerate(pairs)
        ]
        return self.put(self.normal(*ranks, stream=10 * stream), factors)

    def put(self, core: np.ndarray, factors: Sequence[np.ndarray]) -> gt.TuckerPoint:
        return gt.TuckerPoint(self.array(core), tuple(self.array(u) for u in factors))

    def pull(self, point: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        """Core and factors of any pair as NumPy arrays in float64."""
        core, factors = point
        double = [self.backend.numpy(array).astype(np.float64) for array in (core, *factors)]
        return double[0], double[1:]

    def dense(self, point: Any) -> np.ndarray:
        """Full tensor in float64, by the reference."""
        return reference.reconstruct(*self.pull(point))

    def tangent(self, point: gt.TuckerPoint, tangent: gt.TuckerTangent) -> np.ndarray:
        """Full tensor of a tangent vector by the formula of `TuckerTangent`'s docstring."""
        core, factors = self.pull(point)
        velocity, ks = self.pull(tangent)
        total = reference.reconstruct(velocity, factors)
        for mode, k in enumerate(ks):
            q = np.linalg.qr(reference.unfold(core, mode).T)[0]
            moved = [q.shape[1], *_without(core.shape, mode)]
            block = np.moveaxis(q.T.reshape(moved), 0, mode)
            total += reference.reconstruct(
                block, [k if j == mode else u for j, u in enumerate(factors)]
            )
        return total


def _without(shape: Sequence[int], mode: int) -> tuple[int, ...]:
    return (*shape[:mode], *shape[mode + 1 :])


@st.composite
def cases(
    draw: st.DrawFn,
    backend: Any,
    min_order: int = 1,
    max_order: int = 5,
    dtypes: Sequence[str] = ("float64", "float32"),
) -> Case:
    """Draw a case: any shape on NumPy and PyTorch, one of a short list elsewhere."""
    if backend.name not in ANY_SHAPE:
        fits = [c for c in _SHORT_LIST if min_order <= len(c[1]) <= max_order and c[0] in dtypes]
        return Case(backend, *draw(st.sampled_from(fits)), seed=0)
    dtype, order = draw(st.sampled_from(dtypes)), draw(st.integers(min_order, max_order))
    shape = draw(st.tuples(*[st.integers(1, _SIDES[order])] * order))
    ranks = feasible(draw(st.tuples(*(st.integers(1, n) for n in shape))))
    return Case(backend, dtype, shape, ranks, draw(st.integers(0, 2**16)))


def taus(backend: Any) -> st.SearchStrategy[float]:
    """Draw a truncation tolerance (each gives other ranks, so only one where shapes cost)."""
    values = [1e-3, 0.05, 0.2, 0.5, 0.9] if backend.name in ANY_SHAPE else [0.2]
    return st.sampled_from(values)


def feasible(ranks: Sequence[int]) -> tuple[int, ...]:
    """Lower ranks until each is at most the product of the others."""
    lowered = list(ranks)
    for _ in range(sum(ranks)):
        for i, rank in enumerate(lowered):
            lowered[i] = min(rank, math.prod(lowered) // rank)
    return tuple(lowered)


def assert_close(got: Any, expected: Any, tolerance: float, scale: float = 0.0) -> None:
    """Assert that arrays agree to `tolerance` times the norm of `expected` (or `scale`)."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    error = float(np.linalg.norm(got - expected))
    size = max(float(np.linalg.norm(expected)), scale)
    assert error <= tolerance * size, f"error {error:.2e}, allowed {tolerance:.1e} of {size:.2e}"


def assert_orthonormal(case: Case, point: Any, multiple: float = 50.0) -> None:
    """Assert ``|U_i^T U_i - I| <= 50 eps``, in float64, without geotucker's own check."""
    for u in case.pull(point)[1]:
        assert np.abs(u.T @ u - np.eye(u.shape[1])).max() <= multiple * case.eps


def arrays_in(result: Any) -> Iterator[Any]:
    """Yield the arrays in nested tuples and lists: points, tangent vectors, states."""
    if isinstance(result, (tuple, list)):
        for part in result:
            yield from arrays_in(part)
    else:
        yield result


def keep_all(spectra: Sequence[gt.Spectrum]) -> list[tuple[int, ...]]:
    """Keep every rank: a rank rule that truncates nothing."""
    return [tuple(len(values) for values in spectrum.values) for spectrum in spectra]


def quadratic(
    case: Case, target: np.ndarray, weights: np.ndarray | float = 1.0
) -> tuple[Callable[[Any], tuple[float, Any]], reference.Gradient]:
    """Return ``L(W) = <weights * (W - target), W - target> / 2``, for geotucker and dense."""

    def gradient(tensor: np.ndarray) -> np.ndarray:
        return weights * (tensor - target)

    def objective(point: Any) -> tuple[float, Any]:
        residual = case.dense(point) - target
        return float(np.sum(weights * residual**2)) / 2, case.array(weights * residual)

    return objective, gradient


def step(
    integrator: Any, point: Any, objective: Any, ranks: Any, state: gt.State | None = None
) -> gt.StepResult:
    """One step, from the initial state unless another is given."""
    state = integrator.init(point) if state is None else state
    return integrator.step(point, objective, state, gt.as_rule(ranks))
