"""Dynamical low-rank approximation: tensor differential equations on the Tucker manifold."""

from ._fields import Sum
from ._integrate import Evolution, TimeStep, integrate

__all__ = ["Evolution", "Sum", "TimeStep", "integrate"]
