"""Linear models of tensor samples, whose coefficients are a tensor of low multilinear rank."""

from typing import Any

import numpy as np
from scipy.special import log_expit, softmax
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin, is_classifier
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

import geotucker as gt

from ._logistic import ProfiledLogistic
from ._samples import Array, TensorSamples, check_array
from ._solve import minimise

__all__ = ["TuckerClassifier", "TuckerRegressor"]


class _Linear(TensorSamples):
    """What regression and classification share: ``<X_k, W> + b``."""

    point_: gt.TuckerPoint
    intercept_: Any

    def __init__(
        self,
        ranks: Any = 3,
        *,
        sample_shape: Any = None,
        ridge: float = 1.0,
        fit_intercept: bool = True,
        max_iter: int = 300,
        tol: float = 1e-6,
        random_state: Any = None,
    ) -> None:
        self.ranks = ranks
        self.sample_shape = sample_shape
        self.ridge = ridge
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    @property
    def coef_(self) -> Array:
        """The coefficients, shape (p,) for p features, or (q, p) for q outputs or classes."""
        coefficients = gt.to_dense(self.point_).reshape(self.n_features_in_, *self._outputs).T
        return np.atleast_2d(coefficients) if is_classifier(self) else coefficients

    @property
    def _outputs(self) -> tuple[int, ...]:
        return self.point_.shape[len(self.sample_shape_) :]

    def _minimise(self, samples: Array, observed: Array, loss: gt.EntryLoss) -> None:
        """Find W; the loss sees to the intercept."""
        if self.fit_intercept:  # then the mean is of no account, but descent is quicker without
            samples = samples - samples.mean(axis=0)
        self.point_, self.n_iter_ = minimise(
            gt.regression(samples, observed, loss, self.ridge),
            self.ranks,
            max_iter=self.max_iter,
            tol=self.tol,
            random_state=self.random_state,
        )

    def _products(self, samples: Array) -> Array:
        """Return ``<X_k, W>``."""
        return gt.Samples(samples, self._outputs).predict(self.point_)

    def _predicted(self, X: Any) -> Array:
        check_is_fitted(self)
        return self._products(self._check_new_samples(X)) + self.intercept_


class TuckerRegressor(MultiOutputMixin, RegressorMixin, _Linear):
    """Ridge regression on tensors, ``<X_k, W> + b``, with W of low multilinear rank.

    A tensor W of shape (p_1, ..., p_d), or (p_1, ..., p_d, q) for q outputs, is found by conjugate
    gradients on `geotucker.regression`. Where samples are vectors and y a number this is ridge
    regression; where y is a vector, reduced-rank regression. `score` is R^2.

    Parameters
    ----------
    ranks : int, float or tuple of int
        Of W, as for `geotucker.Fixed`: a common cap, a fraction of its entries, or the rank of
        each mode, that of the outputs included where y is a vector.
    sample_shape : tuple of int, optional
        Shape (p_1, ..., p_d) that the rows of a table fold to; by default that of the samples as
        they are given.
    ridge : float
        Weight of ``||W||^2 / 2`` beside half of the sum of squared errors, as ``alpha`` of
        `sklearn.linear_model.Ridge`.
    fit_intercept : bool
        Have a b, which the ridge leaves alone: samples and outputs are centred. Otherwise it is 0.
    max_iter : int
        At most so many steps.
    tol : float
        Stop once ten steps lower the loss by at most this share of what it is at ``W = 0``.
    random_state : int, RandomState or None
        Of the starting point.

    Attributes
    ----------
    point_ : TuckerPoint
        The W.
    coef_ : array
        Its entries as linear models of scikit-learn have them, formed when asked for: of shape (p,)
        for p features, or (q, p) for q outputs.
    intercept_ : float or array
        The b, of several outputs one for each.
    sample_shape_ : tuple of int
        Shape of a sample.
    n_iter_ : int
        Steps taken.
    n_features_in_ : int
        Number of entries of a sample.
    feature_names_in_ : array of str
        Where X had names.

    Examples
    --------
    >>> import numpy as np
    >>> from geotucker_sklearn import TuckerRegressor
    >>> X = np.random.default_rng(0).standard_normal((200, 6, 5))
    >>> y = X[:, 2].sum(axis=1) + 3.0  # W is a matrix of rank one
    >>> model = TuckerRegressor(ranks=1, ridge=0.0, tol=1e-12).fit(X, y)
    >>> round(float(model.intercept_), 3), np.round(abs(model.coef_.reshape(6, 5))[2], 3).tolist()
    (3.0, [1.0, 1.0, 1.0, 1.0, 1.0])
    """

    def fit(self, X: Any, y: Any) -> "TuckerRegressor":
        """Find the coefficients.

        Parameters
        ----------
        X : array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)
            Samples; float32 stays what it is, all else becomes float64.
        y : array, shape (n,) or (n, q)
            Outputs.

        Returns
        -------
        TuckerRegressor
            Itself.

        Raises
        ------
        ValueError
            If X and y are not finite or do not fit each other, or a parameter cannot be used; as
            `geotucker.ShapeError` if X does not fit `sample_shape`, as `geotucker.RankError` if
            `ranks` cannot be used.
        """
        samples, y = self._check_samples(X, y, multi_output=True, y_numeric=True)
        y = check_array(y, ensure_2d=False, dtype=samples.dtype, input_name="y")
        mean = y.mean(axis=0) if self.fit_intercept else y.dtype.type(0.0)
        self._minimise(samples, y - mean, gt.Squared())
        rest = y - self._products(samples)
        self.intercept_ = rest.mean(axis=0) if self.fit_intercept else mean
        return self

    def predict(self, X: Any) -> Array:
        """Return the outputs for samples.

        Parameters
        ----------
        X : array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)

        Returns
        -------
        array, shape (n,) or (n, q)

        Raises
        ------
        ValueError
            If X does not fit what `fit` was given.
        """
        return self._predicted(X)


class TuckerClassifier(ClassifierMixin, _Linear):
    """Logistic regression on tensors, with coefficients of low multilinear rank.

    Two classes have the logit ``<X_k, W> + b``. More have one each, against all others, and one
    tensor W of shape (p_1, ..., p_d, classes): they share its bases. W is found by conjugate
    gradients on `geotucker.regression`. `score` is the accuracy.

    Parameters
    ----------
    ranks : int, float or tuple of int
        Of W, as for `geotucker.Fixed`: a common cap, a fraction of its entries, or the rank of
        each mode, that of the classes included if there are more than two.
    sample_shape : tuple of int, optional
        Shape (p_1, ..., p_d) that the rows of a table fold to; by default that of the samples as
        they are given.
    ridge : float
        Weight of ``||W||^2 / 2`` beside the sum of cross entropies, as ``1 / C`` of
        `sklearn.linear_model.LogisticRegression`.
    fit_intercept : bool
        Have a b for each logit, which the ridge leaves alone: it is the best one for every W that
        is tried. Otherwise it is 0.
    max_iter : int
        At most so many steps.
    tol : float
        Stop once ten steps lower the loss by at most this share of what it is at ``W = 0``.
    random_state : int, RandomState or None
        Of the starting point.

    Attributes
    ----------
    classes_ : array
        The labels, in order.
    point_ : TuckerPoint
        The W.
    coef_ : array
        Its entries as linear models of scikit-learn have them, formed when asked for: of shape
        (1, p) for two classes and p features, or (q, p) for q classes.
    intercept_ : array
        The b, of shape (1,) for two classes, or (q,).
    sample_shape_ : tuple of int
        Shape of a sample.
    n_iter_ : int
        Steps taken.
    n_features_in_ : int
        Number of entries of a sample.
    feature_names_in_ : array of str
        Where X had names.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from geotucker_sklearn import TuckerClassifier
    >>> digits = load_digits()
    >>> X, y = digits.images / 16, digits.target
    >>> model = TuckerClassifier(ranks=(6, 6, 9), max_iter=100, tol=1e-4).fit(X[:1000], y[:1000])
    >>> model.score(X[1000:], y[1000:]) > 0.85, model.point_.size, model.coef_.size
    (True, 510, 640)
    """

    def fit(self, X: Any, y: Any) -> "TuckerClassifier":
        """Find the coefficients.

        Parameters
        ----------
        X : array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)
            Samples; float32 stays what it is, all else becomes float64.
        y : array, shape (n,)
            Labels of two classes at least.

        Returns
        -------
        TuckerClassifier
            Itself.

        Raises
        ------
        ValueError
            If X is not finite, X and y do not fit each other, y holds no classes or only one, or a
            parameter cannot be used; as `geotucker.ShapeError` if X does not fit
            `sample_shape`, as `geotucker.RankError` if `ranks` cannot be used.
        """
        samples, y = self._check_samples(X, y)
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y: expected two classes at least, got one class, {classes[0]!r}")
        observed = np.eye(len(classes), dtype=samples.dtype)[codes]
        if len(classes) == 2:
            observed = observed[:, 1]
        profiled = ProfiledLogistic(observed)
        self._minimise(samples, observed, profiled if self.fit_intercept else gt.Logistic())
        products = self._products(samples)
        none = np.zeros(products.shape[1:], products.dtype)
        intercept = profiled.intercept(products) if self.fit_intercept else none
        self.intercept_ = np.atleast_1d(intercept)
        self.classes_ = classes
        return self

    def decision_function(self, X: Any) -> Array:
        """Return the logits of samples.

        Parameters
        ----------
        X : array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)

        Returns
        -------
        array, shape (n,) or (n, classes)
            Of two classes, those of the second.

        Raises
        ------
        ValueError
            If X does not fit what `fit` was given.
        """
        return self._predicted(X)

    def predict(self, X: Any) -> Array:
        """Return the likeliest classes.

        Parameters
        ----------
        X : array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)

        Returns
        -------
        array, shape (n,)

        Raises
        ------
        ValueError
            If X does not fit what `fit` was given.
        """
        chosen = _logits(self.decision_function(X)).argmax(axis=1)
        return self.classes_[chosen]

    def predict_proba(self, X: Any) -> Array:
        """Return the probabilities of the classes.

        Each class against all others has one; they are divided by their sum.

        Parameters
        ----------
        X : array, shape (n, p_1, ..., p_d) or (n, p_1 * ... * p_d)

        Returns
        -------
        array, shape (n, classes)

        Raises
        ------
        ValueError
            If X does not fit what `fit` was given.
        """
        # Logarithms, so that a sum of tiny probabilities is not zero.
        return softmax(log_expit(_logits(self.decision_function(X))), axis=1)


def _logits(decision: Array) -> Array:
    """Return a column for each class, also of two."""
    return np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision
