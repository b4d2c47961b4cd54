"""Regression and classification against scikit-learn's dense models and the core's objectives."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_array
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import geotucker as gt
from geotucker_sklearn import TuckerClassifier, TuckerRegressor
from geotucker_sklearn._logistic import ProfiledLogistic

RNG = np.random.default_rng(0)
SAMPLES = RNG.standard_normal((120, 4, 5)) + 3.0  # far from centred: the intercept matters
TRUTH = np.outer(np.linspace(-1, 1, 4), np.linspace(1, 2, 5))
NUMBERS = np.tensordot(SAMPLES, TRUTH, 2) + 7.0 + 0.1 * RNG.standard_normal(120)
VECTORS = np.stack([NUMBERS, RNG.standard_normal(120), -2.0 * NUMBERS], axis=1)
LABELS = np.where(np.median(NUMBERS) < NUMBERS, "many", "few")
CLASSES = np.digitize(NUMBERS, np.quantile(NUMBERS, [0.2, 0.6]))
EXACT = {"tol": 1e-14, "max_iter": 2000, "random_state": 0}


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("y", [NUMBERS, VECTORS], ids=["number", "vector"])
def test_at_full_ranks_it_is_ridge_regression(y, intercept):
    rows = SAMPLES.reshape(120, -1)
    settings = {"fit_intercept": intercept}
    ours = TuckerRegressor(99, ridge=2.0, sample_shape=(4, 5), **settings, **EXACT).fit(rows, y)
    theirs = Ridge(2.0, **settings).fit(rows, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-5)
    np.testing.assert_allclose(ours.predict(rows), theirs.predict(rows), atol=1e-5)
    assert ours.score(rows, y) == pytest.approx(theirs.score(rows, y))


@pytest.mark.parametrize("intercept", [True, False])
def test_at_full_ranks_it_is_logistic_regression(intercept):
    rows = SAMPLES.reshape(120, -1)
    settings = {"fit_intercept": intercept}
    ours = TuckerClassifier(99, sample_shape=(4, 5), **settings, **EXACT).fit(rows, LABELS)
    theirs = LogisticRegression(tol=1e-10, max_iter=10_000, **settings).fit(rows, LABELS)
    assert ours.coef_.shape == theirs.coef_.shape == (1, 20)
    assert ours.intercept_.shape == theirs.intercept_.shape == (1,)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-4)
    np.testing.assert_allclose(ours.predict_proba(rows), theirs.predict_proba(rows), atol=1e-5)
    assert list(ours.classes_) == ["few", "many"]
    np.testing.assert_array_equal(ours.predict(rows), theirs.predict(rows))


def test_at_full_ranks_many_classes_are_one_against_the_rest():
    rows = SAMPLES.reshape(120, -1)
    ours = TuckerClassifier(99, **EXACT).fit(rows, CLASSES)
    dense = LogisticRegression(tol=1e-10, max_iter=10_000)
    theirs = OneVsRestClassifier(dense).fit(rows, CLASSES)
    np.testing.assert_allclose(
        ours.decision_function(rows), theirs.decision_function(rows), atol=1e-4
    )
    np.testing.assert_allclose(ours.predict_proba(rows), theirs.predict_proba(rows), atol=1e-5)
    np.testing.assert_array_equal(ours.predict(rows), theirs.predict(rows))
    assert ours.coef_.shape == (3, 20)
    assert ours.intercept_.shape == (3,)
    without = TuckerClassifier(1, fit_intercept=False, tol=1e-2).fit(SAMPLES, CLASSES)
    np.testing.assert_array_equal(without.intercept_, np.zeros(3))


def test_at_low_rank_it_is_what_the_core_finds():
    model = TuckerRegressor(1, ridge=0.5, **EXACT).fit(SAMPLES, NUMBERS)
    centred, mean = SAMPLES - SAMPLES.mean(axis=0), NUMBERS.mean()
    fit = gt.regression(centred, NUMBERS - mean, ridge=0.5)
    found = gt.minimize(fit, fit.start(1), integrator=gt.ConjugateGradient(), steps=200).point
    np.testing.assert_allclose(gt.to_dense(model.point_), gt.to_dense(found), atol=1e-6)
    np.testing.assert_allclose(model.predict(SAMPLES), fit.map.predict(found) + mean, atol=1e-6)
    np.testing.assert_allclose(model.coef_.reshape(4, 5), TRUTH, atol=0.05)


@given(st.integers(2, 30), st.integers(1, 4), st.floats(0.1, 300.0), st.integers(0, 99))
def test_the_profiled_loss_is_the_least_over_intercepts(count, outputs, size, seed):
    rng = np.random.default_rng(seed)
    predicted = size * rng.standard_normal((count, outputs))
    observed = np.zeros((count, outputs))
    for column in observed.T:  # zeros and ones in each
        column[rng.permutation(count)[: rng.integers(1, count)]] = 1.0
    profiled, logistic = ProfiledLogistic(observed), gt.Logistic()
    b = profiled.intercept(predicted)
    least = profiled.value(predicted, observed)
    assert least == pytest.approx(logistic.value(predicted + b, observed))
    np.testing.assert_allclose(profiled.slope(predicted, observed).sum(axis=0), 0.0, atol=1e-8)
    assert profiled.value(predicted + 5.0, observed) == pytest.approx(least, abs=1e-9)
    searched = sum(
        minimize_scalar(lambda c, p=p, y=y: logistic.value(p + c, y), bracket=(-1.0, 1.0)).fun
        for p, y in zip(predicted.T, observed.T, strict=True)
    )
    assert least <= searched + 1e-9 * (1 + searched)


def test_the_profiled_slope_is_the_derivative():
    predicted, observed = RNG.standard_normal(9), np.arange(9) % 3 / 2.0
    loss = ProfiledLogistic(observed)
    for unit in 1e-6 * np.eye(9):
        difference = loss.value(predicted + unit, observed) - loss.value(predicted - unit, observed)
        slope = loss.slope(predicted, observed) @ unit
        assert difference / 2 == pytest.approx(slope, abs=1e-13)
        bend = loss.slope(predicted + unit, observed) - loss.slope(predicted - unit, observed)
        assert bend @ unit / 2 <= loss.curvature(predicted) @ unit**2 + 1e-15


def test_many_classes_without_any_probability_still_have_shares():
    model = TuckerClassifier(2).fit(SAMPLES, CLASSES)
    far = model.predict_proba(1e6 * SAMPLES)
    np.testing.assert_allclose(far.sum(axis=1), 1.0)


def test_outputs_have_the_shape_of_y():
    column = TuckerRegressor(2).fit(SAMPLES, VECTORS[:, :1])
    assert column.predict(SAMPLES).shape == (120, 1)
    assert column.coef_.shape == (1, 20)
    assert TuckerRegressor(2).fit(SAMPLES, VECTORS).point_.shape == (4, 5, 3)


def test_single_precision_stays():
    single = SAMPLES.astype(np.float32)
    regressor = TuckerRegressor(1).fit(single, NUMBERS)
    assert regressor.predict(single).dtype == np.float32
    classifier = TuckerClassifier(1, tol=1e-3).fit(single, CLASSES)
    assert classifier.predict_proba(single).dtype == np.float32


def test_single_precision_suffices_at_any_scale():
    single = (1e5 * SAMPLES).astype(np.float32)
    assert (
        TuckerRegressor(2, ridge=0.0).fit(single, 1e6 * NUMBERS).score(single, 1e6 * NUMBERS) > 0.99
    )
    assert TuckerClassifier(2).fit(1e4 * single, LABELS).score(1e4 * single, LABELS) > 0.9


@pytest.mark.parametrize("y", [np.full(120, 3.0), np.zeros(120)], ids=["constant", "zero"])
def test_what_needs_no_samples_is_the_intercept(y):
    model = TuckerRegressor(2).fit(SAMPLES, y)
    np.testing.assert_allclose(model.predict(SAMPLES), y)
    assert gt.norm(model.point_) == 0.0


def test_a_search_chooses_ranks_and_ridge():
    digits = load_digits()
    X, y = digits.data[:400], digits.target[:400]
    model = make_pipeline(StandardScaler(), TuckerClassifier(sample_shape=(8, 8), tol=1e-3))
    grid = {"tuckerclassifier__ranks": [1, (5, 5, 8)], "tuckerclassifier__ridge": [10.0]}
    search = GridSearchCV(model, grid, cv=2).fit(X, y)
    assert search.best_params_["tuckerclassifier__ranks"] == (5, 5, 8)
    assert search.best_score_ > 0.8
    assert cross_val_score(TuckerRegressor(1), SAMPLES, NUMBERS, cv=3).min() > 0.95


def test_too_few_steps_are_told():
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        model = TuckerRegressor(2, max_iter=3).fit(SAMPLES, NUMBERS)
    assert model.n_iter_ == 3


FAILURES = {
    "ranks": (TuckerRegressor((2, 2, 2)), NUMBERS, gt.RankError, "ranks: expected 2 positive"),
    "a rule": (
        TuckerRegressor(gt.Tolerance(0.1)),
        NUMBERS,
        gt.RankError,
        "ranks: expected a positive integer, a fraction or a tuple",
    ),
    "ridge": (TuckerRegressor(ridge=-1.0), NUMBERS, ValueError, "ridge: expected a number of at"),
    "max_iter": (TuckerRegressor(max_iter=0), NUMBERS, ValueError, "max_iter == 0, must be >= 1"),
    "tol": (TuckerRegressor(tol=-1.0), NUMBERS, ValueError, "tol == -1.0, must be >= 0"),
    "steps in words": (TuckerRegressor(max_iter="all"), NUMBERS, TypeError, "max_iter must be"),
    "lengths": (TuckerRegressor(), NUMBERS[1:], ValueError, "inconsistent numbers of samples"),
    "infinite": (TuckerRegressor(), np.append(NUMBERS[1:], np.inf), ValueError, "infinity"),
    "sparse": (TuckerRegressor(), csr_array(VECTORS), TypeError, "Sparse data was passed for y"),
    "no y": (TuckerRegressor(), None, ValueError, "requires y to be passed"),
    "one class": (TuckerClassifier(), np.ones(120, int), ValueError, "got one class, "),
    "no classes": (TuckerClassifier(), NUMBERS, ValueError, "Unknown label type: continuous"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_fit_refuses(name):
    model, y, error, message = FAILURES[name]
    with pytest.raises(error, match=message):
        model.fit(SAMPLES, y)
    assert not hasattr(model, "point_")


def test_predict_refuses_other_shapes():
    model = TuckerRegressor(1).fit(SAMPLES, NUMBERS)
    with pytest.raises(gt.ShapeError, match=r"X: expected samples of shape \(4, 5\), got"):
        model.predict(np.ones((2, 5, 4, 1)))
