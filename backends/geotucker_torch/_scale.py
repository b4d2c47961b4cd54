"""The size of a core's step: learning rates are meant for dense weights.

*Optimizers that normalise gradients entry by entry.* Adam and its kin move every entry by about
the learning rate, so a weight of N entries moves by about ``lr sqrt(N)`` in the Frobenius norm,
whatever its gradient. In Tucker format only the n entries of the core are stepped, in orthonormal
bases, and the weight would move by ``lr sqrt(n)``: at low ranks, a small part of what the learning
rate means for the dense layer. The factor ``sqrt(N / n)`` gives the weight the root mean square per
step that it has there. (Muon's steps are matched to Adam's in the same way: Liu et al. 2025,
arXiv:2502.16982, section 2.2.)

*Others.* SGD's step is the gradient's, of which the projection on a tangent space of n dimensions
passes what counts, as bases follow the gradient, but only ``sqrt(n / N)`` of noise that has no
direction. So there is no one factor: 1 keeps the step along the gradient, and ``sqrt(N / n)`` the
noise, that of the dense layer. Powers in between trade one for the other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["decays_apart", "moving_entries", "normalises", "scale_step", "tangent_dimension"]

# Second moments by which a step is divided.
_DIVISORS = {"exp_avg_sq", "exp_inf", "square_avg", "sum"}

# Optimizers that decay weights beside the step and do not say so in their groups.
_DECOUPLED = tuple(
    getattr(torch.optim, name)
    for name in ("AdamW", "Adafactor", "Muon")
    if hasattr(torch.optim, name)
)


def normalises(state: Mapping[str, Any]) -> bool:
    """Tell from its state for a parameter whether an optimizer normalises entry by entry.

    Adadelta's steps are in units of its past steps, and are none of these.
    """
    return not _DIVISORS.isdisjoint(state) and "acc_delta" not in state


def decays_apart(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    """Tell whether an optimizer's weight decay is none of the gradient's, but beside the step."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, _DECOUPLED)))


def moving_entries(ranks: Sequence[int], wide: Sequence[int], tangent: bool) -> int:
    """Count the entries of a core that has been widened from `ranks` that a step moves.

    Examples
    --------
    >>> moving_entries((2, 3), (4, 5), tangent=False), moving_entries((2, 3), (4, 5), tangent=True)
    (20, 16)
    """
    if not tangent:
        return math.prod(wide)
    old = math.prod(ranks)  # one block beside it in each mode
    return old + sum((m - r) * old // r for r, m in zip(ranks, wide, strict=True))


def tangent_dimension(shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Return the dimension of the tangent space: that of the cores, and of r_i (n_i - r_i) turns.

    At ranks that no tensor has, which a loaded state may have for a step, that of all tensors.

    Examples
    --------
    >>> tangent_dimension((40, 30), (3, 3)), tangent_dimension((4, 5), (4, 5))
    (201, 20)
    >>> tangent_dimension((9, 2), (5, 1))
    18
    """
    turns = sum(r * (n - r) for n, r in zip(shape, ranks, strict=True))
    return min(math.prod(ranks) + turns, math.prod(shape))


def scale_step(
    core: Tensor, before: Tensor, factor: float, group: Mapping[str, Any], decoupled: bool
) -> None:
    """Scale the step that has led from `before` to `core`, but not its decoupled weight decay.

    Parameters
    ----------
    core : Tensor
        Is written in place.
    before : Tensor
    factor : float
    group : mapping
        The parameter group, with "lr" and "weight_decay".
    decoupled : bool
        Whether the weight decays beside the step, as in AdamW.
    """
    start = before
    if decoupled:
        start = before * (1.0 - group["lr"] * group.get("weight_decay", 0.0))
    core.copy_(torch.lerp(start, core, factor))
