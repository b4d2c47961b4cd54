"""Tucker tensors, the geometry of fixed multilinear rank, and integrators that adapt ranks.

The arrays may be NumPy's, PyTorch's, JAX's or CuPy's, as TensorLy's backends provide them.
The binding for neural networks in PyTorch is the package ``geotucker_torch``.
"""

from . import testing
from ._dynamics import Evolution, Sum, TimeStep, integrate
from ._errors import (
    BackendError,
    FileFormatError,
    GeotuckerError,
    MemoryLimitError,
    NonFiniteError,
    RankError,
    ShapeError,
    StepSizeError,
)
from ._files import load, save
from ._geometry import (
    Contractable,
    augment,
    inner_tangent,
    project,
    retract,
    tangent_to_point,
    transport,
)
from ._hosvd import Truncation, hosvd, orthonormalise, round, spectrum, st_hosvd, truncate
from ._integrators import (
    TDLRT,
    CoreScheme,
    Euler,
    Flow,
    HeavyBall,
    Integrator,
    Report,
    Standard,
    State,
    StepResult,
    Tangent,
)
from ._minimize import Result, minimize, when_flat
from ._ranks import (
    Budget,
    Cost,
    DescentSafe,
    Facts,
    Fixed,
    ModeRule,
    RankRule,
    Spectrum,
    Tolerance,
    as_rule,
)
from ._streaming import Decomposition, decompose_file, reconstruct_file
from ._tensor import TuckerPoint, TuckerTangent, add, as_point, inner, norm, scale, to_dense
from ._version import __version__

__all__ = [
    "TDLRT",
    "BackendError",
    "Budget",
    "Contractable",
    "CoreScheme",
    "Cost",
    "Decomposition",
    "DescentSafe",
    "Euler",
    "Evolution",
    "Facts",
    "FileFormatError",
    "Fixed",
    "Flow",
    "GeotuckerError",
    "HeavyBall",
    "Integrator",
    "MemoryLimitError",
    "ModeRule",
    "NonFiniteError",
    "RankError",
    "RankRule",
    "Report",
    "Result",
    "ShapeError",
    "Spectrum",
    "Standard",
    "State",
    "StepResult",
    "StepSizeError",
    "Sum",
    "Tangent",
    "TimeStep",
    "Tolerance",
    "Truncation",
    "TuckerPoint",
    "TuckerTangent",
    "__version__",
    "add",
    "as_point",
    "as_rule",
    "augment",
    "decompose_file",
    "hosvd",
    "inner",
    "inner_tangent",
    "integrate",
    "load",
    "minimize",
    "norm",
    "orthonormalise",
    "project",
    "reconstruct_file",
    "retract",
    "round",
    "save",
    "scale",
    "spectrum",
    "st_hosvd",
    "tangent_to_point",
    "testing",
    "to_dense",
    "transport",
    "truncate",
    "when_flat",
]
