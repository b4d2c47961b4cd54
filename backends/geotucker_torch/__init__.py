"""Binding for PyTorch: layers in Tucker format, and models that are turned into them.

`factorize` replaces the Linear and convolutional layers of a model by Tucker layers, whose
weights are a core and orthonormal factors, and `densify` goes back. `TDLRT` wraps a torch
optimizer and trains them: it moves the bases and adapts the ranks. `finalize` turns a trained model
into plain modules, the smallest, to be fine-tuned or exported, and `optimize_for_inference` into
those that are measured to be the fastest.
"""

from ._factorize import Factorization, FactorizedLayer, densify, factorize, plan
from ._finalize import finalize
from ._inference import optimize_for_inference
from ._layers import TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLinear, TuckerModule
from ._optimizer import TDLRT

__all__ = [
    "TDLRT",
    "Factorization",
    "FactorizedLayer",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "TuckerLinear",
    "TuckerModule",
    "densify",
    "factorize",
    "finalize",
    "optimize_for_inference",
    "plan",
]
