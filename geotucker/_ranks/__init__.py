"""Rank rules: from the singular values of every mode to the multilinear rank to keep.

A rule is a pure function of spectra. It sees all tensors of a network at once, so that a
rule may trade ranks between layers (`Budget`); most rules look at one mode at a time and are
written as a `ModeRule`. Spectra are small NumPy arrays on the host, whatever the tensors are.
"""

from ._base import (
    Cost,
    Facts,
    ModeRule,
    RankRule,
    Ranks,
    Spectrum,
    Values,
    choose,
    in_force,
    is_count,
    tail_norms,
)
from ._budget import Budget
from ._descent import DescentSafe
from ._modes import Fixed, Growing, Tolerance, as_rule
from ._sensitivity import Sensitivities, sensitivity

__all__ = [
    "Budget",
    "Cost",
    "DescentSafe",
    "Facts",
    "Fixed",
    "Growing",
    "ModeRule",
    "RankRule",
    "Ranks",
    "Sensitivities",
    "Spectrum",
    "Tolerance",
    "Values",
    "as_rule",
    "choose",
    "in_force",
    "is_count",
    "sensitivity",
    "tail_norms",
]
