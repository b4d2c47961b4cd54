"""Binding for PyTorch: layers in Tucker format, and models that are turned into them.

`factorize` replaces the linear, convolution and embedding layers of a model by Tucker layers, whose
weights are a core and orthonormal factors, and `densify` goes back. `TDLRT` wraps a torch optimizer
and trains them: it moves the bases and adapts the ranks. `save_checkpoint` and `load_checkpoint`
keep a training in a file, `load_weights` and `dense_state_dict` carry weights between dense and
factorised models. `AveragedModel` averages models over steps. `finalize` turns a trained model into
plain modules, the smallest, to be fine-tuned or exported, and `optimize_for_inference` into those
that are measured to be the fastest. `spectra` measures the weights of a model, and `summary`,
`plot` and `report` show them. `from_tltorch` and `to_tltorch` go between this package and
tensorly-torch.
"""

from ._attention import TuckerMultiheadAttention
from ._averaging import AveragedModel
from ._checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ._collectives import ProcessError
from ._distribute import distribute
from ._embedding import TuckerEmbedding
from ._factorize import Factorization, FactorizedLayer, densify, factorize, plan
from ._finalize import finalize
from ._inference import optimize_for_inference
from ._layers import TuckerConv1d, TuckerConv2d, TuckerConv3d, TuckerLinear, TuckerModule
from ._metrics import metrics
from ._optimizer import TDLRT
from ._spectra import Spectra, WeightSpectra, spectra, summary
from ._tensor_embedding import TuckerTensorEmbedding
from ._tensor_linear import TuckerTensorLinear
from ._tltorch import from_tltorch, to_tltorch
from ._transposed import TuckerConvTranspose1d, TuckerConvTranspose2d, TuckerConvTranspose3d
from ._views import plot, report
from ._weights import dense_state_dict, load_weights

__all__ = [
    "TDLRT",
    "AveragedModel",
    "CheckpointError",
    "Factorization",
    "FactorizedLayer",
    "ProcessError",
    "Spectra",
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "TuckerConvTranspose1d",
    "TuckerConvTranspose2d",
    "TuckerConvTranspose3d",
    "TuckerEmbedding",
    "TuckerLinear",
    "TuckerModule",
    "TuckerMultiheadAttention",
    "TuckerTensorEmbedding",
    "TuckerTensorLinear",
    "WeightSpectra",
    "dense_state_dict",
    "densify",
    "distribute",
    "factorize",
    "finalize",
    "from_tltorch",
    "load_checkpoint",
    "load_weights",
    "metrics",
    "optimize_for_inference",
    "plan",
    "plot",
    "report",
    "save_checkpoint",
    "spectra",
    "summary",
    "to_tltorch",
]
