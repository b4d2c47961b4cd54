"""Completion of tensors from coordinates and values."""

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, KFold

import geotucker as gt
from geotucker_sklearn import TuckerCompletion

SHAPE = (12, 13, 14)
TENSOR = gt.to_dense(gt.testing.random_point(SHAPE, (2, 2, 2), seed=1))
EVERYWHERE = np.argwhere(np.ones(SHAPE))
CHOSEN = np.random.default_rng(0).permutation(len(EVERYWHERE))
X = EVERYWHERE[CHOSEN[:1000]]
Y = TENSOR[tuple(X.T)]


@pytest.mark.parametrize("growth", [10, None])
def test_a_tensor_of_low_rank_is_found(growth):
    model = TuckerCompletion(2, growth=growth, ridge=0.0, tol=1e-12, random_state=0).fit(X, Y)
    assert model.shape_ == SHAPE
    assert model.point_.ranks == (2, 2, 2)
    rest = EVERYWHERE[CHOSEN[1000:]]
    predicted, truth = model.predict(rest), TENSOR[tuple(rest.T)]
    np.testing.assert_allclose(predicted, truth, atol=1e-4 * abs(TENSOR).max())
    assert model.score(rest, truth) == r2_score(truth, predicted)
    np.testing.assert_allclose(model.predict(rest), gt.to_dense(model.point_)[tuple(rest.T)])


def test_it_is_what_the_core_finds():
    noisy = Y + 0.1 * np.random.default_rng(1).standard_normal(1000)
    model = TuckerCompletion(2, ridge=0.1, tol=1e-9, random_state=0).fit(X, noisy)
    fit = gt.completion(X.T, noisy, SHAPE, ridge=0.1 * 1000 / (12 * 13 * 14))
    found = gt.minimize(
        fit,
        fit.start(1),
        integrator=gt.ConjugateGradient(),
        ranks=gt.Growing(2, every=10),
        steps=model.n_iter_,
    )
    np.testing.assert_allclose(
        gt.to_dense(model.point_), gt.to_dense(found.point), atol=1e-5 * abs(TENSOR).max()
    )


def test_all_can_be_chosen():
    rng = np.random.default_rng(2)
    effects = np.add.outer(np.add.outer(*(rng.standard_normal(n) for n in SHAPE[:2])), np.zeros(14))
    few, rest = EVERYWHERE[CHOSEN[:150]], EVERYWHERE[CHOSEN[150:]]
    noisy = effects[tuple(few.T)] + 3.0 + 0.7 * rng.standard_normal(150)
    truth = effects[tuple(rest.T)] + 3.0
    chosen = TuckerCompletion("auto", shape=SHAPE, seconds=3.0, random_state=0).fit(few, noisy)
    assert 0.0 < chosen.pooling_ < 1.0
    given = TuckerCompletion(3, shape=SHAPE, random_state=0).fit(few, noisy)
    assert chosen.score(rest, truth) > max(0.6, given.score(rest, truth) + 0.2)
    again = TuckerCompletion(
        chosen.point_.ranks,
        shape=SHAPE,
        ridge=chosen.ridge_,
        pooling=chosen.pooling_,
        tol=1e-4,
        random_state=0,
    ).fit(few, noisy)
    assert again.score(rest, truth) > chosen.score(rest, truth) - 0.1


def test_pooling_draws_what_was_never_seen_to_the_mean():
    known = X[X[:, 0] != 3]
    model = TuckerCompletion(1, shape=SHAPE, pooling=0.9, ridge=0.1, random_state=0)
    model.fit(known, np.full(len(known), 5.0))
    np.testing.assert_allclose(model.predict([[3, 0, 0], [3, 12, 13]]), 5.0, rtol=0.15)


def test_slices_that_were_never_seen_are_predicted_as_the_mean():
    known = X[(X[:, 0] != 3)]
    y = TENSOR[tuple(known.T)] + 5.0
    unseen = np.array([[3, 0, 0], [3, 12, 13]])
    centred = TuckerCompletion(1, shape=SHAPE, fit_intercept=True).fit(known, y)
    np.testing.assert_allclose(centred.predict(unseen), y.mean())
    assert centred.intercept_ == y.mean()
    plain = TuckerCompletion(1, shape=SHAPE).fit(known, y)
    np.testing.assert_allclose(plain.predict(unseen), 0.0, atol=1e-12)


def test_whole_numbers_may_be_floats_and_values_integers():
    settings = {"ranks": 1, "tol": 1e-3, "random_state": 0}
    of_integers = TuckerCompletion(**settings).fit(X, np.rint(10 * Y).astype(int))
    of_floats = TuckerCompletion(**settings).fit(X.astype(float), np.rint(10 * Y))
    np.testing.assert_array_equal(of_integers.predict(X), of_floats.predict(X.astype(float)))


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "int64", "float16", "float32", "float64"]
)
def test_single_precision_stays_and_all_else_becomes_double(dtype):
    model = TuckerCompletion(1, tol=1e-2, random_state=0).fit(X, (10 * Y).astype(dtype))
    expected = np.float32 if dtype == "float32" else np.float64
    assert model.point_.core.dtype == model.predict(X).dtype == expected


def test_a_search_finds_the_ranks():
    rng = np.random.default_rng(3)
    tensor = gt.to_dense((rng.random((2, 2, 2)), [rng.random((n, 2)) for n in SHAPE]))
    noisy = tensor + 0.1 * tensor.std() * rng.standard_normal(SHAPE)
    search = GridSearchCV(
        TuckerCompletion(shape=SHAPE, tol=1e-3),
        {"ranks": [1, 2]},
        cv=KFold(2, shuffle=True, random_state=0),
    ).fit(X, noisy[tuple(X.T)])
    assert search.best_params_ == {"ranks": 2}
    rest = EVERYWHERE[CHOSEN[1000:]]
    assert search.score(rest, tensor[tuple(rest.T)]) > 0.98


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # of no ridge
def test_the_more_ridge_the_smaller_the_tensor():
    known = EVERYWHERE[CHOSEN[:300]]
    y = TENSOR[tuple(known.T)]
    norms = [
        gt.norm(TuckerCompletion(1, ridge=ridge, max_iter=30).fit(known, y).point_)
        for ridge in (0.0, 0.01, 0.1, 1.0)
    ]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 3 * norms[-1]


@pytest.mark.parametrize(("growth", "max_iter"), [(10, 25), (10_000, 30), (1, 13)])
def test_growth_has_an_end_before_the_run_has(growth, max_iter):
    model = TuckerCompletion(12, growth=growth, max_iter=max_iter, tol=0.0)
    with pytest.warns(ConvergenceWarning, match=rf"max_iter={max_iter} steps the loss still fell"):
        model.fit(X, Y)
    assert model.point_.ranks == (12, 12, 12)


def test_growth_is_no_faster_than_it_has_to_be():
    settings = {"tol": 0.0, "max_iter": 45, "random_state": 0}
    slow, slower = (TuckerCompletion(3, growth=growth, **settings) for growth in (11, 99))
    with pytest.warns(ConvergenceWarning):
        np.testing.assert_array_equal(slow.fit(X, Y).point_.core, slower.fit(X, Y).point_.core)
    faster = TuckerCompletion(3, growth=4, **settings)
    with pytest.warns(ConvergenceWarning):
        assert not np.array_equal(faster.fit(X, Y).point_.core, slow.point_.core)


def test_steps_that_do_not_suffice_to_grow_are_told():
    model = TuckerCompletion(12, growth=10, max_iter=11)
    message = r"had grown to \(11, 11, 11\), not to \(12, 12, 12\); raise max_iter above 11, or"
    with pytest.warns(ConvergenceWarning, match=message):
        model.fit(X, Y)
    assert model.n_iter_ == 11
    model.set_params(growth=None)
    with pytest.warns(ConvergenceWarning, match="the loss still fell"):
        model.fit(X, Y)
    assert model.point_.ranks == (12, 12, 12)


FAILURES = {
    "fractions": ({}, X + 0.5, Y, ValueError, "X: expected whole numbers"),
    "huge": ({}, X * 1e300, Y, ValueError, "X: expected whole numbers"),
    "negative": ({}, X - 1, Y, ValueError, "Negative values in data passed to TuckerCompletion"),
    "NaN": ({}, X, np.full(1000, np.nan), ValueError, "NaN"),
    "outside": (
        {"shape": (12, 13, 13)},
        X,
        Y,
        gt.ShapeError,
        r"X: expected coordinates below \(12, 13, 13\), got \(11, 12, 13\)",
    ),
    "order": (
        {"shape": (12, 13)},
        X,
        Y,
        gt.ShapeError,
        r"shape: expected 3 integers, one for each column of X, got \(12, 13\)",
    ),
    "no shape": ({"shape": 12}, X, Y, gt.ShapeError, "shape: expected a tuple of integers, got 12"),
    "ranks": ({"ranks": (1, 2)}, X, Y, gt.RankError, "ranks: expected 3 positive integers"),
    "growth": ({"growth": 0}, X, Y, ValueError, "growth == 0, must be >= 1"),
    "pooling": ({"pooling": 1.0}, X, Y, ValueError, r"pooling: expected a number in \[0, 1\)"),
    "word": ({"ranks": "few"}, X, Y, gt.RankError, 'ranks: expected numbers or "auto", got \'few'),
    "seconds": (
        {"ranks": "auto", "seconds": 0.0},
        X,
        Y,
        ValueError,
        "seconds == 0.0, must be > 0",
    ),
    "one entry": (
        {"ranks": "auto", "shape": SHAPE},
        X[:1],
        Y[:1],
        ValueError,
        '"auto" holds entries out and needs 2 samples',
    ),
    "ridge": ({"ridge": -1.0}, X, Y, ValueError, "ridge == -1.0, must be >= 0.0"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_fit_refuses(name):
    settings, coordinates, values, error, message = FAILURES[name]
    model = TuckerCompletion(**settings)
    with pytest.raises(error, match=message):
        model.fit(coordinates, values)
    assert not hasattr(model, "point_")


def test_predict_refuses_what_lies_outside():
    model = TuckerCompletion(1, tol=1e-2).fit(X, Y)
    with pytest.raises(gt.ShapeError, match=r"X: expected coordinates below \(12, 13, 14\), got"):
        model.predict([[0, 0, 14]])
    with pytest.raises(ValueError, match="whole numbers"):
        model.predict([[0, 0, 0.5]])
    with pytest.raises(ValueError, match="2 features"):
        model.predict([[0, 0]])
