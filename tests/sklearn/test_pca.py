"""Compression against PCA and the core's own decompositions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import geotucker as gt
from geotucker_sklearn import TuckerPCA

SAMPLES = np.random.default_rng(0).standard_normal((30, 4, 5, 3)) * np.arange(1, 5)[:, None, None]


@st.composite
def tables(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    count = draw(st.integers(2, 12))
    return np.random.default_rng(draw(st.integers(0, 99))).standard_normal((count, *shape))


def test_of_vectors_it_is_pca():
    rows = SAMPLES.reshape(30, -1)
    ours, theirs = TuckerPCA(7).fit(rows), PCA(7).fit(rows)
    (basis,) = ours.factors_
    np.testing.assert_allclose(basis @ basis.T, theirs.components_.T @ theirs.components_)
    np.testing.assert_allclose(
        ours.explained_variance_ratio_, theirs.explained_variance_ratio_, rtol=1e-10
    )
    np.testing.assert_allclose(abs(ours.transform(rows)), abs(theirs.transform(rows)), atol=1e-10)
    np.testing.assert_allclose(
        ours.inverse_transform(ours.transform(rows)),
        theirs.inverse_transform(theirs.transform(rows)),
    )


def test_bases_are_those_of_the_sequentially_truncated_hosvd():
    samples = np.moveaxis(SAMPLES - SAMPLES.mean(axis=0), 0, -1)
    point = gt.st_hosvd(samples, (2, 3, 2, 30))
    model = TuckerPCA((2, 3, 2)).fit(SAMPLES)
    for ours, cores in zip(model.factors_, point.factors, strict=False):
        np.testing.assert_allclose(ours @ ours.T, cores @ cores.T, atol=1e-12)
    back = model.inverse_transform(model.transform(SAMPLES))
    dense = np.moveaxis(gt.to_dense(point), -1, 0) + SAMPLES.mean(axis=0)
    np.testing.assert_allclose(back, dense)


@given(tables(), st.floats(0.0, 0.9))
def test_a_tolerance_holds_and_the_score_is_what_is_explained(samples, tau):
    model = TuckerPCA(gt.Tolerance(tau)).fit(samples)
    back = model.inverse_transform(model.transform(samples))
    centred = samples - samples.mean(axis=0)
    error, total = np.linalg.norm(back - samples), np.linalg.norm(centred)
    assert error <= (tau + 1e-12) * total
    explained = 1.0 - (error / total) ** 2
    assert model.score(samples) == pytest.approx(explained, abs=1e-12)
    assert model.explained_variance_ratio_.sum() == pytest.approx(explained, abs=1e-12)
    assert len(model.explained_variance_ratio_) == model.n_components_ == np.prod(model.ranks_)


@given(tables(), st.integers(0, 99))
def test_projecting_twice_is_projecting_once_on_new_samples_too(samples, seed):
    model = TuckerPCA(2).fit(samples)
    new = np.random.default_rng(seed).standard_normal((4, *samples.shape[1:]))
    back = model.inverse_transform(model.transform(new))
    np.testing.assert_allclose(model.inverse_transform(model.transform(back)), back, atol=1e-12)
    total = np.linalg.norm(new - model.mean_) ** 2
    assert model.score(new) == pytest.approx(1 - np.linalg.norm(back - new) ** 2 / total, abs=1e-12)


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (3, (3, 3, 3)),
        (99, (4, 5, 3)),
        ((4, 1, 2), (4, 1, 2)),  # more than 1 * 2: of many samples this is no contradiction
        (gt.Fixed((2, 2, 2)), (2, 2, 2)),
        (gt.Tolerance(0.0, cap=2), (2, 2, 2)),
        (1.0, (4, 4, 3)),  # 5 would keep everything, and the bases come on top
        (1e-9, (1, 1, 1)),
    ],
)
def test_every_rule_of_the_core_is_welcome(ranks, expected):
    assert TuckerPCA(ranks).fit(SAMPLES).ranks_ == expected


@given(st.floats(0.01, 1.0))
def test_a_fraction_bounds_what_is_kept(share):
    model = TuckerPCA(share).fit(SAMPLES)

    def size(rank):
        ranks = [min(rank, n) for n in (4, 5, 3)]
        return 30 * np.prod(ranks) + np.dot(ranks, (4, 5, 3))

    common = max(model.ranks_)
    assert size(common) <= share * SAMPLES.size or common == 1
    assert size(common + 1) > share * SAMPLES.size


def test_tables_fold_to_tensors():
    rows = SAMPLES.reshape(30, -1)
    folded, direct = TuckerPCA(2, sample_shape=(4, 5, 3)).fit(rows), TuckerPCA(2).fit(SAMPLES)
    coefficients = direct.transform(SAMPLES)
    np.testing.assert_array_equal(folded.transform(rows), coefficients)
    np.testing.assert_array_equal(folded.transform(SAMPLES), coefficients)
    np.testing.assert_array_equal(direct.transform(rows), coefficients)
    assert folded.inverse_transform(coefficients).shape == rows.shape
    assert direct.inverse_transform(coefficients).shape == SAMPLES.shape
    assert list(direct.get_feature_names_out()) == [f"tuckerpca{i}" for i in range(8)]
    assert folded.n_features_in_ == direct.n_features_in_ == 60


def test_samples_without_variance_are_explained():
    model = TuckerPCA(2).fit(np.ones((3, 4, 5)))
    assert model.score(np.ones((3, 4, 5))) == 1.0
    assert np.all(model.explained_variance_ratio_ == 0.0)


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e20, "f4"), (1e-25, "f4"), (1e160, "f8"), (1e-170, "f8")]
)
def test_what_is_explained_does_not_depend_on_the_scale(scale, dtype):
    samples = (scale * SAMPLES).astype(dtype)
    shares = TuckerPCA(2).fit(samples).explained_variance_ratio_
    assert shares.dtype == dtype
    np.testing.assert_allclose(shares, TuckerPCA(2).fit(SAMPLES).explained_variance_ratio_, 1e-3)
    assert np.sum(shares) == pytest.approx(TuckerPCA(2).fit(samples).score(samples), rel=1e-5)


def test_single_precision_stays():
    single = SAMPLES.astype(np.float32)
    model = TuckerPCA(2).fit(single)
    assert model.inverse_transform(model.transform(single)).dtype == np.float32
    assert {array.dtype for array in (model.mean_, *model.factors_)} == {np.dtype(np.float32)}


def test_a_search_chooses_ranks_in_a_pipeline():
    digits = load_digits()
    X, y = digits.data[:600] / 16, digits.target[:600]
    steps = StandardScaler(), TuckerPCA(sample_shape=(8, 8)), LogisticRegression(max_iter=1000)
    candidates = [1, gt.Tolerance(0.3)]
    search = GridSearchCV(make_pipeline(*steps), {"tuckerpca__ranks": candidates}, cv=3).fit(X, y)
    assert search.best_params_ == {"tuckerpca__ranks": gt.Tolerance(0.3)}
    assert search.best_score_ > 0.85


FAILURES = {
    "one sample": (TuckerPCA(), SAMPLES[:1], ValueError, "minimum of 2 is required"),
    "NaN": (TuckerPCA(), np.full((3, 2, 2), np.nan), ValueError, "NaN"),
    "a norm beyond numbers": (
        TuckerPCA(),
        np.array([[1.7e308, 0.0, 1.7e308], [-1.7e308, 0.0, -1.7e308]]),
        gt.NonFiniteError,
        "X: expected a norm of at most 1.8e[+]308, the largest number of float64",
    ),
    "complex": (TuckerPCA(), SAMPLES * 1j, ValueError, "Complex"),
    "product": (
        TuckerPCA(sample_shape=(7, 8)),
        SAMPLES.reshape(30, -1),
        gt.ShapeError,
        "sample_shape: expected positive integers whose product is 60",
    ),
    "negative": (
        TuckerPCA(sample_shape=(-6, -10)),
        SAMPLES.reshape(30, -1),
        gt.ShapeError,
        "sample_shape: expected positive integers",
    ),
    "no tuple": (
        TuckerPCA(sample_shape=60),
        SAMPLES.reshape(30, -1),
        gt.ShapeError,
        "sample_shape: expected a tuple of integers, got 60",
    ),
    "two shapes": (
        TuckerPCA(sample_shape=(5, 4, 3)),
        SAMPLES,
        gt.ShapeError,
        r"sample_shape: expected \(4, 5, 3\) as X has, got \(5, 4, 3\)",
    ),
    "ranks of another order": (
        TuckerPCA((2, 2)),
        SAMPLES,
        gt.RankError,
        r"ranks: expected 3 positive integers for samples of shape \(4, 5, 3\), got \(2, 2\)",
    ),
    "no ranks": (TuckerPCA("many"), SAMPLES, gt.RankError, "ranks: expected a rank rule"),
    "a budget": (
        TuckerPCA(gt.Budget(parameters=0.5)),
        SAMPLES,
        gt.RankError,
        "TuckerPCA needs a rule that decides mode by mode",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_fit_refuses(name):
    model, samples, error, message = FAILURES[name]
    with pytest.raises(error, match=message):
        model.fit(samples)
    assert not hasattr(model, "factors_")


def test_transform_refuses_other_shapes():
    model = TuckerPCA(2).fit(SAMPLES)
    with pytest.raises(gt.ShapeError, match=r"X: expected samples of shape \(4, 5, 3\), got"):
        model.transform(np.ones((2, 5, 4, 3)))
    with pytest.raises(ValueError, match="59 features"):
        model.transform(np.ones((2, 59)))
    with pytest.raises(gt.ShapeError, match="X: expected 8 coefficients a row, got 7"):
        model.inverse_transform(np.ones((2, 7)))
