"""Compression of tensor samples: principal components, mode by mode."""

import math
from typing import Any

import numpy as np
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

import geotucker as gt
from geotucker import _ops
from geotucker._hosvd import as_mode_rule, cut_mode
from geotucker._tensor import check_norm

from ._samples import REAL, Array, TensorSamples, check_array

__all__ = ["TuckerPCA"]


class TuckerPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, TensorSamples):
    """Principal component analysis of tensors: one orthonormal basis for each mode of a sample.

    A centred sample X is kept as its coefficients ``X x_1 U_1^T ... x_d U_d^T``. The U_i are those
    of a sequentially truncated HOSVD of all samples, whose own mode stays whole. Where samples are
    vectors this is PCA. Where they are tensors the bases take ``sum p_i r_i`` numbers, and PCA's
    ``prod p_i prod r_i``.

    Parameters
    ----------
    ranks : ModeRule, int, float or tuple of int
        Of the modes of a sample. `geotucker.Tolerance` gives the smallest ranks with a relative
        error of the centred training samples of at most tau, which explains ``1 - tau^2`` of
        their variance. A float is the share of the training data's entries that bases and
        coefficients may take, at a common rank; unlike PCA's it is no share of variance.
    sample_shape : tuple of int, optional
        Shape (p_1, ..., p_d) that the rows of a table fold to; by default that of the samples as
        they are given.

    Attributes
    ----------
    mean_ : array
        Mean of the training samples, shape (p_1, ..., p_d).
    factors_ : list of arrays
        The U_i, with orthonormal columns, shapes (p_i, r_i).
    ranks_ : tuple of int
        The r_i.
    n_components_ : int
        Number of coefficients, ``prod r_i``.
    explained_variance_ratio_ : array
        Share of the training samples' variance that each coefficient has; they add up to `score`.
    sample_shape_ : tuple of int
        Shape of a sample.
    n_features_in_ : int
        Number of entries of a sample.
    feature_names_in_ : array of str
        Where X had names.

    References
    ----------
    Lu, Plataniotis, Venetsanopoulos. MPCA: multilinear principal component analysis of tensor
    objects. IEEE Trans. Neural Netw. 19 (2008), whose full projection truncation this is, in
    sequence (Vannieuwenhoven, Vandebril, Meerbergen 2012).

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from geotucker_sklearn import TuckerPCA
    >>> images = load_digits().images  # shape: (1797, 8, 8)
    >>> pca = TuckerPCA(ranks=(5, 5)).fit(images)
    >>> pca.transform(images).shape, round(pca.score(images), 3)
    ((1797, 25), 0.868)
    >>> pca.inverse_transform(pca.transform(images[:10])).shape
    (10, 8, 8)
    """

    def __init__(self, ranks: Any = gt.Tolerance(0.1), *, sample_shape: Any = None) -> None:  # noqa: B008
        self.ranks = ranks
        self.sample_shape = sample_shape

    def fit(self, X: Any, y: Any = None) -> "TuckerPCA":
        """Find the bases.

        Parameters
        ----------
        X : array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)
            Samples, two at least; float32 stays what it is, all else becomes float64.
        y : object
            Ignored.

        Returns
        -------
        TuckerPCA
            Itself.

        Raises
        ------
        ValueError
            If X is not finite or has one sample; as `geotucker.ShapeError` if it does not fit
            `sample_shape`, as `geotucker.RankError` if `ranks` cannot be used.
        geotucker.NonFiniteError
            If the norm of the centred samples is beyond their dtype.
        """
        samples = self._check_samples(X, ensure_min_samples=2)
        shape, count = self.sample_shape_, len(samples)
        rule = _rule(self.ranks, shape, count)
        mean = samples.mean(axis=0)
        core, factors = np.moveaxis(samples - mean, 0, -1), []
        check_norm(core, "X")
        total = _ops.norm(core) or 1.0
        for mode in range(len(shape)):
            core, basis, _ = cut_mode(core, mode, rule, shape)
            factors.append(basis)
        self.mean_, self.factors_ = mean, factors
        self.ranks_ = core.shape[:-1]
        self.n_components_ = self._n_features_out = math.prod(self.ranks_)
        # Divided first, and in float64: squares may leave the range of either precision.
        shares = np.divide(core.reshape(-1, count), total, dtype=np.float64)
        self.explained_variance_ratio_ = np.sum(shares**2, axis=1).astype(core.dtype)
        return self

    def transform(self, X: Any) -> Array:
        """Return the coefficients of samples.

        Parameters
        ----------
        X : array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)

        Returns
        -------
        array, shape (n, n_components_)
            The cores, of shape `ranks_`, as rows in C order.

        Raises
        ------
        ValueError
            If X does not fit what `fit` was given.
        """
        check_is_fitted(self)
        return self._coefficients(self._check_new_samples(X))

    def inverse_transform(self, X: Any) -> Array:
        """Return the samples that coefficients stand for.

        Parameters
        ----------
        X : array, shape (n, n_components_)

        Returns
        -------
        array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)
            In the form that `fit` was given.

        Raises
        ------
        ValueError
            If X is not finite or has another number of columns.
        """
        check_is_fitted(self)
        rows = check_array(X, dtype=REAL)
        if rows.shape[1] != self.n_components_:
            raise gt.ShapeError(
                f"X: expected {self.n_components_} coefficients a row, got {rows.shape[1]}"
            )
        cores = rows.T.reshape(*self.ranks_, len(rows))
        samples = np.moveaxis(_ops.multi_mode_product(cores, self.factors_), -1, 0) + self.mean_
        return samples.reshape(len(rows), *self._row_shape)

    def score(self, X: Any, y: Any = None) -> float:
        """Return the share of the variance of samples that their coefficients explain.

        It is ``1 - ||X - Y||^2 / ||X - mean_||^2`` for the samples Y that come back, from 0 to 1;
        the mean is that of the training samples.

        Parameters
        ----------
        X : array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)
        y : object
            Ignored.

        Returns
        -------
        float
            1 also where there is no variance.
        """
        check_is_fitted(self)
        samples = self._check_new_samples(X)
        total = _ops.norm(samples - self.mean_)
        # Bases are orthonormal: squares of coefficients and errors add up to the total.
        return (_ops.norm(self._coefficients(samples)) / total) ** 2 if total else 1.0

    def _coefficients(self, samples: Array) -> Array:
        tensor = np.moveaxis(samples - self.mean_, 0, -1)
        core = _ops.multi_mode_product(tensor, self.factors_, transpose=True)
        return core.reshape(self.n_components_, len(samples)).T


class _Capped(gt.ModeRule):
    """A rank for each mode of a sample.

    `Fixed` would also see to ``r_i <= prod_{j != i} r_j``, which holds of a tensor, and not of
    many samples together.
    """

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks

    def mode_rank(self, values: Any, mode: int, shape: Any, previous: int | None = None) -> int:
        return min(self.ranks[mode], len(values))


def _rule(ranks: Any, shape: tuple[int, ...], count: int) -> gt.ModeRule:
    """Return the rule for the modes of a sample."""
    rule = as_mode_rule(ranks, "TuckerPCA")
    if not isinstance(rule, gt.Fixed):
        return rule
    if isinstance(rule.ranks, tuple):
        if len(rule.ranks) != len(shape):
            raise gt.RankError(
                f"ranks: expected {len(shape)} positive integers for samples of shape {shape}, "
                f"got {rule.ranks}"
            )
        return _Capped(rule.ranks)
    if isinstance(rule.ranks, (float, np.floating)):
        return _Capped((_common(float(rule.ranks), shape, count),) * len(shape))
    return _Capped((int(rule.ranks),) * len(shape))


def _common(share: float, shape: tuple[int, ...], count: int) -> int:
    """Return the largest common rank within a share of the entries of all samples, at least 1."""

    def size(cap: int) -> int:
        ranks = [min(cap, n) for n in shape]
        return count * math.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))

    within = (
        cap for cap in range(max(shape), 1, -1) if size(cap) <= share * count * math.prod(shape)
    )
    return next(within, 1)
