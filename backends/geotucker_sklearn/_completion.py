"""Completion: entries of a tensor by their coordinates."""

import math
import operator
from numbers import Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted, check_non_negative

import geotucker as gt

from ._samples import Array, validate_data
from ._solve import minimise

__all__ = ["TuckerCompletion"]


class TuckerCompletion(RegressorMixin, BaseEstimator):
    """Predict the entries of a tensor from some of them, by a tensor of low multilinear rank.

    A sample is an entry: its coordinates are the row of X, its value is in y. Nothing dense is
    formed, whatever the tensor's shape. `geotucker.completion` is minimised by conjugate gradients
    in ranks that grow from one, which finds the dominant parts first. Where entries are few or
    noisy, or nothing is known of the ranks, take ``ranks="auto"``. `score` is R^2.

    Parameters
    ----------
    ranks : int, float, tuple of int or "auto"
        As for `geotucker.Fixed`: of each mode, a common cap, or a fraction of the entries. With
        "auto", `geotucker.complete` chooses ranks, ridge and pooling by cross-validation among the
        training entries, and `growth`, `ridge`, `pooling`, `max_iter` and `tol` are not read.
    shape : tuple of int, optional
        Shape (n_1, ..., n_d) of the tensor. By default it ends at the largest coordinates of the
        training entries; state it where entries beyond may be asked for, as in cross-validation.
    growth : int, optional
        Steps between two increments of the ranks, fewer where they would not be full after half of
        `max_iter`; None starts with the full ranks.
    ridge : float
        Weight of the mean square of all entries beside the mean squared error of the known ones,
        at least 0. A little of it keeps the tensor from running away where nothing is known; where
        its rank is exact, 0 finds it exactly.
    pooling : float
        In [0, 1): how much slices are expected to be alike, see `geotucker.Pooled`. The ridge then
        draws them to their mean and not to zero, and can be far stronger.
    fit_intercept : bool
        Take the mean of y off first. Coordinates of which the training had no entry are then
        predicted as the mean, and as zero otherwise.
    max_iter : int
        At most so many steps.
    tol : float
        Stop once ten steps raise R^2 on the training entries by at most this (with an intercept;
        else 1 minus the squared relative error).
    seconds : float
        Time for "auto", but for the step in progress.
    random_state : int, RandomState or None
        Of the starting point, or of the folds.

    Attributes
    ----------
    point_ : TuckerPoint
        The tensor, but for the intercept; ``geotucker.to_dense`` forms it.
    intercept_ : float
        Mean of y, or 0.
    shape_ : tuple of int
        Shape of the tensor.
    ridge_, pooling_ : float
        As given or chosen.
    n_iter_ : int
        Steps taken; with "auto", settings tried.
    n_features_in_ : int
        Number of modes.
    feature_names_in_ : array of str
        Where X had names.

    Examples
    --------
    >>> import numpy as np, geotucker as gt
    >>> from geotucker_sklearn import TuckerCompletion
    >>> tensor = gt.to_dense(gt.testing.random_point((20, 20, 20), (2, 2, 2)))
    >>> X = np.argwhere(np.random.default_rng(0).random(tensor.shape) < 0.4)
    >>> model = TuckerCompletion(ranks=2).fit(X, tensor[tuple(X.T)])
    >>> everywhere = np.argwhere(np.ones_like(tensor))
    >>> model.score(everywhere, tensor.ravel()) > 0.999
    True
    """

    def __init__(
        self,
        ranks: Any = 3,
        *,
        shape: Any = None,
        growth: int | None = 10,
        ridge: float = 0.01,
        pooling: float = 0.0,
        fit_intercept: bool = False,
        max_iter: int = 200,
        tol: float = 1e-5,
        seconds: float = math.inf,
        random_state: Any = None,
    ) -> None:
        self.ranks = ranks
        self.shape = shape
        self.growth = growth
        self.ridge = ridge
        self.pooling = pooling
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.seconds = seconds
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that X holds coordinates."""
        tags = super().__sklearn_tags__()
        tags.input_tags.categorical = True
        tags.input_tags.positive_only = True
        tags.regressor_tags.poor_score = True  # of data that are no tensor of low rank
        return tags

    def fit(self, X: Any, y: Any) -> "TuckerCompletion":
        """Find the tensor.

        Parameters
        ----------
        X : array of whole numbers, shape (m, d)
            Coordinates, from 0. An entry that is listed several times counts several times.
        y : array, shape (m,)
            Values; float32 stays what it is, all else becomes float64.

        Returns
        -------
        TuckerCompletion
            Itself.

        Raises
        ------
        ValueError
            If X does not hold coordinates or y finite numbers, or a parameter cannot be used; as
            `geotucker.ShapeError` if X does not fit `shape`, as `geotucker.RankError` if `ranks`
            cannot be used.
        """
        check_scalar(self.ridge, "ridge", Real, min_val=0.0)
        X, y = validate_data(self, X, y, y_numeric=True)
        coordinates = self._whole(X)
        y = y.astype(np.float32 if y.dtype == np.float32 else np.float64, copy=False)
        shape = _shape(self.shape, coordinates)
        _check_within(coordinates, shape)
        intercept = y.mean() if self.fit_intercept else y.dtype.type(0.0)
        # The core's ridge and errors are sums: over all entries, and over the known ones.
        unit = len(y) / math.prod(shape)
        if isinstance(self.ranks, str):
            found = self._choose(coordinates, y - intercept, shape)
            self.point_, self.n_iter_ = found.point, len(found.trials)
            self.ridge_, self.pooling_ = found.ridge / unit, found.pooling
        else:
            pooled = gt.Pooled(gt.Entries(coordinates.T, shape, y), self.pooling)
            point, self.n_iter_ = minimise(
                gt.Fit(pooled, y - intercept, ridge=self.ridge * unit),
                self.ranks,
                growth=self.growth,
                max_iter=self.max_iter,
                tol=self.tol,
                random_state=self.random_state,
            )
            self.point_ = gt.orthonormalise(pooled.tensor(point))
            self.ridge_, self.pooling_ = self.ridge, self.pooling
        self.shape_, self.intercept_ = shape, intercept
        return self

    def predict(self, X: Any) -> Array:
        """Return entries of the tensor.

        Parameters
        ----------
        X : array of whole numbers, shape (m, d)
            Coordinates, from 0.

        Returns
        -------
        array, shape (m,)

        Raises
        ------
        ValueError
            If X does not hold coordinates within the shape of the tensor.
        """
        check_is_fitted(self)
        coordinates = self._whole(validate_data(self, X, reset=False))
        _check_within(coordinates, self.shape_)
        entries = gt.Entries(coordinates.T, self.shape_, self.point_.core)
        return entries.predict(self.point_) + self.intercept_

    def _choose(self, coordinates: Array, y: Array, shape: tuple[int, ...]) -> gt.Completion:
        """Complete by what cross-validation chooses."""
        if self.ranks != "auto":
            raise gt.RankError(f'ranks: expected numbers or "auto", got {self.ranks!r}')
        check_scalar(self.seconds, "seconds", Real, min_val=0.0, include_boundaries="neither")
        if len(y) < 2:
            raise ValueError('ranks: "auto" holds entries out and needs 2 samples, got n_samples=1')
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        return gt.complete(coordinates.T, y, shape, seconds=self.seconds, seed=seed)

    def _whole(self, X: Array) -> Array:
        """Return coordinates as integers."""
        check_non_negative(X, type(self).__name__)
        with np.errstate(invalid="ignore"):  # of numbers too large, which then differ
            whole = X.astype(np.int64)
        if not np.array_equal(whole, X):
            raise ValueError(
                "X: expected whole numbers, the coordinates of an entry in each row, got "
                f"{X[whole != X][0]}"
            )
        return whole


def _shape(given: Any, coordinates: Array) -> tuple[int, ...]:
    """Return the shape of the tensor."""
    if given is None:
        return tuple(int(n) + 1 for n in coordinates.max(axis=0))
    try:
        shape = tuple(operator.index(n) for n in given)
    except TypeError:
        raise gt.ShapeError(f"shape: expected a tuple of integers, got {given!r}") from None
    if len(shape) != coordinates.shape[1]:
        raise gt.ShapeError(
            f"shape: expected {coordinates.shape[1]} integers, one for each column of X, "
            f"got {shape}"
        )
    return shape


def _check_within(coordinates: Array, shape: tuple[int, ...]) -> None:
    largest = tuple(coordinates.max(axis=0).tolist())
    if any(got >= n for got, n in zip(largest, shape, strict=True)):
        raise gt.ShapeError(f"X: expected coordinates below {shape}, got {largest}")
