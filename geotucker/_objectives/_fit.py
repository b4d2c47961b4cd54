"""What all explicit objectives are: a linear map of the tensor, data, and a loss between them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from .. import _ops
from .._errors import NonFiniteError, ShapeError
from .._geometry import Contractable, Gradient, contract
from .._hosvd import orthonormalise, truncate
from .._ops import Array
from .._ranks import Fixed, as_rule
from .._tensor import TuckerPoint, add, as_fitting, check_finite, check_floating, check_like
from ._losses import SQUARED, EntryLoss

__all__ = ["Batches", "Fit", "LinearMap"]


class LinearMap(Protocol):
    """A linear map A of tensors of one shape, known by what it does to Tucker tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (n_1, ..., n_d) of the tensors."""
        ...

    @property
    def observed_shape(self) -> tuple[int, ...]:
        """Shape of what the map returns."""
        ...

    def predict(self, point: TuckerPoint) -> Array:
        """Return A(W), for any factors, orthonormal or not."""
        ...

    def adjoint(self, weights: Array) -> Gradient:
        """Return ``A^*(weights)``: a dense array or, better, a `Contractable`."""
        ...

    def select(self, numbers: "np.ndarray[Any, np.dtype[Any]]") -> "LinearMap":
        """Return the map to some of the observations, by their positions on the first axis."""
        ...


class _Slope(NamedTuple):
    """The gradient ``A^*(l'(A(W), y)) + ridge W`` at a point, never formed.

    Also answers what a line search asks: the second derivative along a direction.
    """

    fit: "Fit"
    point: TuckerPoint
    predicted: Array
    ambient: Gradient

    def contract(self, factors: Sequence[Array], skip: int | None) -> Array:
        """Return ``Z x_{j != skip} factors[j]^T``."""
        contraction = contract(self.ambient, factors, skip)
        if self.fit.ridge:
            contraction = contraction + self.fit.ridge * contract(self.point, factors, skip)
        return contraction

    def curvature(self, direction: TuckerPoint) -> float:
        """Return the second derivative of the loss at the point along a tensor."""
        along = self.fit.map.predict(direction)
        bend = self.fit.loss.curvature(self.predicted)
        curvature = _ops.vdot(bend * along, along)
        if self.fit.ridge:
            curvature += self.fit.ridge * _ops.square_norm(orthonormalise(direction).core)
        return curvature


@dataclass(frozen=True, eq=False)
class Fit:
    """The objective ``L(W) = sum_k l(A(W)_k, y_k) + ridge / 2 ||W||^2``.

    Called with a point it returns the loss and the gradient ``A^*(l'(A(W), y)) + ridge W`` as an
    object that answers its contractions with given bases, so that what is sparse stays sparse.
    `completion`, `regression` and `least_squares` make the usual ones.

    Parameters
    ----------
    map : LinearMap
        From the tensor to what is observed of it.
    observed : array
        The data y, real floating.
    loss : EntryLoss
        `Squared`, `Logistic`, `Poisson`, or an object like them.
    ridge : float
        Weight of the squared norm, at least 0. It keeps what no observation determines small.

    Raises
    ------
    BackendError, NonFiniteError, ShapeError
        If `observed` is not real floating, not finite, or not of the shape that the map gives.
    ValueError
        If `ridge` is negative, or the loss cannot have such observations.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> truth = gt.testing.random_point((6, 7, 8), (2, 2, 2))
    >>> fit = gt.Fit(gt.Full((6, 7, 8)), gt.to_dense(truth))
    >>> loss, gradient = fit(truth)
    >>> loss < 1e-28, gradient.contract(truth.factors, skip=0).shape
    (True, (6, 2, 2))
    """

    map: LinearMap
    observed: Array = field(repr=False)
    loss: EntryLoss = SQUARED
    ridge: float = 0.0

    def __post_init__(self) -> None:
        """Check the data."""
        check_floating(self.observed, "observed")
        if _ops.shape(self.observed) != self.map.observed_shape:
            raise ShapeError(
                f"observed: expected the shape {self.map.observed_shape}, "
                f"got {_ops.shape(self.observed)}"
            )
        check_finite(self.observed, "observed")
        if not 0.0 <= self.ridge < float("inf"):
            raise ValueError(f"ridge: expected a number of at least 0, got {self.ridge}")
        self.loss.check(self.observed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (n_1, ..., n_d) of the tensor that is sought."""
        return self.map.shape

    def __call__(self, point: Any) -> tuple[float, _Slope]:
        """Return the loss at a point ``(core, factors)`` and the gradient there.

        Raises
        ------
        ShapeError, BackendError
            If the point has another shape, library or dtype than the data.
        """
        point = as_fitting(point)
        check_like(point.core, self.observed, "point.core")
        if point.shape != self.shape:
            raise ShapeError(f"point: expected a tensor of shape {self.shape}, got {point.shape}")
        predicted = self.map.predict(point)
        loss = self.loss.value(predicted, self.observed)
        if self.ridge:
            loss += 0.5 * self.ridge * _ops.square_norm(orthonormalise(point).core)
        ambient = self.map.adjoint(self.loss.slope(predicted, self.observed))
        return loss, _Slope(self, point, predicted, ambient)

    def start(self, ranks: Any, sweeps: int = 1, seed: int = 0) -> TuckerPoint:
        """Return a point to start from: one steepest step from zero in Tucker format.

        The direction is the Tucker tensor near ``-grad L(0)`` that higher-order orthogonal
        iteration finds in a few sweeps. (For completion this decomposes the observed entries
        with zeros elsewhere.) The step goes to the minimum along it of the loss's second-order
        model, and is halved until the loss falls.

        The iteration begins with bases that hold the constant vector, the rest random, so that
        at rank one its first sweep gives the sums over slices. More sweeps approach the leading
        singular vectors. Where few entries are known these follow single large ones, and descent
        from there ends in a bad local minimum.

        Parameters
        ----------
        ranks : int, float or tuple of int
            As for `Fixed`.
        sweeps : int
            Each costs a contraction per mode; none keeps the bases that the iteration begins with.
        seed : int
            Of the random vectors.

        Returns
        -------
        TuckerPoint
            With orthonormal factors, and the library, dtype and device of the data.

        Raises
        ------
        RankError, ValueError
            If the ranks cannot be used.
        NonFiniteError
            If the loss of zero, or its gradient, is not finite.

        Examples
        --------
        >>> import numpy as np, geotucker as gt
        >>> tensor = gt.to_dense(gt.testing.random_point((6, 7, 8), (2, 2, 2)))
        >>> start = gt.least_squares(tensor).start(2)
        >>> np.allclose(gt.to_dense(start), tensor)
        True
        """
        zero = self._zero()
        return self._steepest(zero, self._numbers(ranks), sweeps, seed, lambda step: step)

    def grow(self, point: Any, ranks: Any, sweeps: int = 1, seed: int = 0) -> TuckerPoint:
        """Return a point of larger ranks, one steepest step away from a point.

        As `start` does from zero. The direction ``-grad L(W)`` is not projected on the tangent
        space, which at a minimum in the ranks of W holds nothing of it, and has as many ranks as
        are missing, whether one or many. Where no length lowers the loss, which may be if some
        modes keep their ranks, the tensor stays as it is, with empty directions.

        Parameters
        ----------
        point : pair
            Any ``(core, factors)``.
        ranks : int, float or tuple of int
            As for `Fixed`; a mode that has them already keeps its own.
        sweeps, seed : int
            As for `start`.

        Returns
        -------
        TuckerPoint
            With orthonormal factors.

        Raises
        ------
        ShapeError, BackendError, RankError
            If the point does not fit the data, or the ranks cannot be used.
        NonFiniteError
            If the loss of the point, or its gradient, is not finite.

        Examples
        --------
        >>> import numpy as np, geotucker as gt
        >>> tensor = gt.to_dense(gt.testing.random_point((6, 7, 8), (2, 2, 2)))
        >>> fit = gt.least_squares(tensor)
        >>> one = gt.minimize(fit, fit.start(1), integrator=gt.ConjugateGradient(), steps=20)
        >>> two = fit.grow(one.point, 2)
        >>> two.ranks, fit(two)[0] < one.loss
        ((2, 2, 2), True)
        """
        base = orthonormalise(as_fitting(point))
        pairs = zip(self._numbers(ranks), base.ranks, strict=True)
        wanted = [max(pair) for pair in pairs]
        rule = Fixed(tuple(wanted))
        missing = tuple(max(new - old, 1) for new, old in zip(wanted, base.ranks, strict=True))
        if Fixed(missing).for_shape(self.shape) != missing:  # no tensor has them
            missing = rule.for_shape(self.shape)
        return self._steepest(
            base, missing, sweeps, seed, lambda step: truncate([add(base, step)], rule)[0].point
        )

    def _steepest(
        self,
        base: TuckerPoint,
        ranks: Sequence[int],
        sweeps: int,
        seed: int,
        arrive: Callable[[TuckerPoint], TuckerPoint],
    ) -> TuckerPoint:
        """Return where a steepest step of some ranks arrives, shortened until the loss falls."""
        loss, gradient = self(base)
        if not math.isfinite(loss):
            raise NonFiniteError(f"loss: expected a finite number, got {loss}; scale the data")
        direction = _hooi(gradient, self._bases(ranks, seed), sweeps)
        descent = _ops.norm(direction.core)
        unit = TuckerPoint(direction.core / (descent or 1.0), direction.factors)
        length = descent / max(gradient.curvature(unit), 1e-300)
        for _ in range(60 if descent > 0.0 else 0):
            core = length * unit.core
            if math.isfinite(_ops.max_abs(core)):
                end = arrive(TuckerPoint(core, unit.factors))
                if self(end)[0] < loss:  # false for NaN too
                    return end
            length *= 0.5
        return arrive(TuckerPoint(0.0 * direction.core, direction.factors))

    def _numbers(self, ranks: Any) -> tuple[int, ...]:
        rule = as_rule(ranks)
        if not isinstance(rule, Fixed):
            raise ValueError(f"ranks: expected numbers for a start, got {rule}")
        return rule.for_shape(self.shape)

    def _zero(self) -> TuckerPoint:
        core = _ops.zeros((1,) * len(self.shape), like=self.observed)
        units = tuple(_ops.like(np.eye(n, 1), self.observed) for n in self.shape)
        return TuckerPoint(core, units)

    def _bases(self, ranks: Sequence[int], seed: int) -> list[Array]:
        rng = np.random.default_rng(seed)
        columns = [np.ones((n, 1)) for n in self.shape]
        drawn = [rng.standard_normal((n, r - 1)) for n, r in zip(self.shape, ranks, strict=True)]
        pairs = zip(columns, drawn, strict=True)
        return [_ops.like(np.linalg.qr(np.hstack(pair))[0], self.observed) for pair in pairs]

    def batches(self, size: int, seed: int = 0) -> "Batches":
        """Return this objective in random batches of observations, one for each step.

        Parameters
        ----------
        size : int
            Observations a batch: entries, or samples of a regression.
        seed : int
            Of the draws.
        """
        return Batches(self, size, seed)


@dataclass(frozen=True, eq=False)
class Batches:
    """An objective that `minimize` sees one random batch a step of.

    A batch is drawn with replacement, from `seed` and the number of the step only, so that a run
    that goes on from a state is the unbroken run. Its loss is the plain sum over the batch (with
    its share of the ridge): on average ``size / m`` times the whole loss, and no step size that is
    safe for the whole is unsafe for a batch.

    Parameters
    ----------
    fit : Fit
    size : int
    seed : int

    Raises
    ------
    ValueError
        If `size` is not from 1 to the number of observations.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> tensor = gt.to_dense(gt.testing.random_point((6, 7, 8), (2, 2, 2)))
    >>> whole = gt.completion(np.nonzero(np.ones((6, 7, 8))), tensor.ravel(), (6, 7, 8))
    >>> batches = whole.batches(100)
    >>> batches.at(0).observed.shape, batches(gt.hosvd(tensor, 2))[0] < 1e-28
    ((100,), True)
    """

    fit: Fit
    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        count = self.fit.map.observed_shape[0]
        if not 1 <= self.size <= count:
            raise ValueError(f"size: expected from 1 to {count} observations, got {self.size}")

    def at(self, step: int) -> Fit:
        """Return the batch of a step."""
        count = self.fit.map.observed_shape[0]
        numbers = np.random.default_rng([self.seed, step]).integers(0, count, self.size)
        observed = _ops.take(self.fit.observed, _ops.index_like(numbers, self.fit.observed))
        ridge = self.fit.ridge * self.size / count
        return replace(self.fit, map=self.fit.map.select(numbers), observed=observed, ridge=ridge)

    def __call__(self, point: Any) -> tuple[float, Contractable]:
        """Return the whole loss and its gradient."""
        return self.fit(point)


def _hooi(gradient: Contractable, bases: Sequence[Array], sweeps: int) -> TuckerPoint:
    """Approximate ``-Z`` by higher-order orthogonal iteration from given bases."""
    bases, ranks = list(bases), [_ops.shape(u)[1] for u in bases]
    for _ in range(sweeps):
        for mode, rank in enumerate(ranks):
            g = _ops.unfold(gradient.contract(bases, skip=mode), mode)
            check_finite(g, "gradient")
            bases[mode] = _ops.svd(g)[0][:, :rank]
    return TuckerPoint(-gradient.contract(bases, skip=None), tuple(bases))
