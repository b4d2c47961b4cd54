"""Integrators: one algorithm a file, one interface for all."""

from ._base import CoreScheme, Euler, HeavyBall, Integrator, Report, State, StepResult
from ._conjugate import ConjugateGradient
from ._flow import Flow
from ._standard import Standard
from ._tangent import Tangent
from ._tdlrt import TDLRT

__all__ = [
    "TDLRT",
    "ConjugateGradient",
    "CoreScheme",
    "Euler",
    "Flow",
    "HeavyBall",
    "Integrator",
    "Report",
    "Standard",
    "State",
    "StepResult",
    "Tangent",
]
