"""What scikit-learn asks of every estimator, by its own checks."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

import geotucker as gt
from geotucker_sklearn import TuckerClassifier, TuckerCompletion, TuckerPCA, TuckerRegressor

# The checks' tables have up to ten columns: as coordinates, those of tensors with ten modes.
QUICK = TuckerCompletion(ranks=1, max_iter=5)

ESTIMATORS = [TuckerPCA(), TuckerRegressor(), TuckerClassifier(), QUICK]

# Noise, and few steps.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@parametrize_with_checks(ESTIMATORS)
def test_passes_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_rules_and_shapes_survive_clone_and_pickle(estimator):
    rule = gt.Tolerance(0.3) if isinstance(estimator, TuckerPCA) else (2, 1)
    name = "shape" if isinstance(estimator, TuckerCompletion) else "sample_shape"
    copy = clone(clone(estimator).set_params(ranks=rule, **{name: (4, 5)}))
    again = pickle.loads(pickle.dumps(copy))
    for other in (copy, again):
        assert other.get_params() == estimator.get_params() | {"ranks": rule, name: (4, 5)}


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_a_copy_is_not_fitted(estimator):
    samples = np.indices((3, 4)).reshape(2, -1).T
    fitted = clone(estimator).fit(samples, np.arange(12) % 2)
    method = "transform" if isinstance(estimator, TuckerPCA) else "predict"
    first = getattr(pickle.loads(pickle.dumps(fitted)), method)(samples)
    np.testing.assert_array_equal(first, getattr(fitted, method)(samples))
    with pytest.raises(NotFittedError):
        getattr(clone(fitted), method)(samples)
