"""Samples that are tensors, where scikit-learn's own are rows of a table."""

import math
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils import validation

import geotucker as gt

__all__ = ["REAL", "Array", "TensorSamples", "check_array", "validate_data"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

REAL = [np.float64, np.float32]
"""What is computed in; all else becomes the first."""

# scikit-learn has no annotations, and what type checkers infer from its defaults is too narrow.
check_array: Callable[..., Any] = validation.check_array
validate_data: Callable[..., Any] = validation.validate_data


class TensorSamples(BaseEstimator):
    """Base of estimators whose samples are tensors, given as such or as rows of their entries.

    The constructor's `sample_shape` says what the rows of a table fold to, in C order.
    """

    sample_shape: Any
    sample_shape_: tuple[int, ...]
    n_features_in_: int

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that samples of higher order are welcome."""
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def _check_samples(self, X: Any, y: Any = "no_validation", **checks: Any) -> Any:
        """Check training data; return X of shape (n, p_1, ..., p_d), and y if it is given."""
        rows, given = _rows(X)
        checked = validate_data(self, rows, y, dtype=REAL, **checks)
        rows = checked if isinstance(y, str) else checked[0]
        self._row_shape = given or rows.shape[1:]
        self.sample_shape_ = self._fold(self._row_shape)
        samples = rows.reshape(-1, *self.sample_shape_)
        return samples if isinstance(y, str) else (samples, checked[1])

    def _check_new_samples(self, X: Any) -> Array:
        """Check samples against those of `fit`; return them as tensors."""
        rows, given = _rows(X)
        if given not in (None, self.sample_shape_):
            raise gt.ShapeError(f"X: expected samples of shape {self.sample_shape_}, got {given}")
        rows = validate_data(self, rows, reset=False, dtype=REAL)
        return rows.reshape(-1, *self.sample_shape_)

    def _fold(self, given: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the samples, if `sample_shape` fits what was given."""
        if self.sample_shape is None:
            return given
        try:
            shape = tuple(operator.index(n) for n in self.sample_shape)
        except TypeError:
            raise gt.ShapeError(
                f"sample_shape: expected a tuple of integers, got {self.sample_shape!r}"
            ) from None
        if len(given) > 1 and shape != given:
            raise gt.ShapeError(f"sample_shape: expected {given} as X has, got {shape}")
        if min(shape, default=0) < 1 or math.prod(shape) != math.prod(given):
            raise gt.ShapeError(
                f"sample_shape: expected positive integers whose product is {math.prod(given)}, "
                f"the number of features of X, got {shape}"
            )
        return shape


def _rows(X: Any) -> tuple[Any, tuple[int, ...] | None]:
    """Return samples of higher order as rows, with their shape; leave the rest as it is."""
    tensor = X if hasattr(X, "ndim") else np.asarray(X)  # sparse matrices and tables have one
    if tensor.ndim <= 2:
        return X, None
    tensor = np.asarray(tensor)
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:])), tensor.shape[1:]
