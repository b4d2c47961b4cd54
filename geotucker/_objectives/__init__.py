"""Objectives with gradients in factored form: a linear map, data, and a loss of each number."""

from ._autodiff import Autodiff
from ._entries import Entries, completion
from ._fit import Batches, Fit, LinearMap
from ._full import Full, least_squares
from ._losses import EntryLoss, Logistic, Poisson, Squared
from ._pooled import Pooled
from ._samples import Samples, regression

__all__ = [
    "Autodiff",
    "Batches",
    "Entries",
    "EntryLoss",
    "Fit",
    "Full",
    "LinearMap",
    "Logistic",
    "Poisson",
    "Pooled",
    "Samples",
    "Squared",
    "completion",
    "least_squares",
    "regression",
]
