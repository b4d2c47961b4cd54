"""Binding for scikit-learn: estimators for tensors, as its pipelines and searches want them.

`TuckerPCA` compresses samples that are tensors, `TuckerRegressor` and `TuckerClassifier` predict
numbers and classes from them, `TuckerCompletion` predicts the missing entries of a tensor from the
known ones. All compute by the functions of `geotucker` on NumPy arrays.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "geotucker_sklearn needs scikit-learn: pip install 'geotucker[sklearn]'", name=error.name
    ) from error

from ._completion import TuckerCompletion
from ._linear import TuckerClassifier, TuckerRegressor
from ._pca import TuckerPCA

__all__ = ["TuckerClassifier", "TuckerCompletion", "TuckerPCA", "TuckerRegressor"]
