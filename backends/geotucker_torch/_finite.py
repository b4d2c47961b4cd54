"""NaN and infinity, looked for with one question to the device."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import geotucker as gt
from geotucker import _ops

from ._collectives import Group
from ._parts import is_sharded, largest_entry

__all__ = ["Largest", "check_finite", "largest_of"]


class Largest(NamedTuple):
    """The largest magnitude of a tensor, still on its device, with a name for the message.

    NaN counts as larger than all numbers, so that a finite one proves that every entry is finite.
    """

    name: str
    magnitude: Tensor


def largest_of(named: Iterable[tuple[str, Tensor]], group: Group | None = None) -> list[Largest]:
    """Return the largest magnitudes of tensors, dense or sparse; nothing is asked of the device.

    For tensors in parts the processes of a group exchange them.
    """
    found = []
    for name, tensor in named:
        values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
        if values.numel():
            if is_sharded(values):
                found.append(Largest(name, largest_entry(values, group)))
            else:
                found.append(Largest(name, torch.linalg.vector_norm(values, math.inf)))
    return found


def check_finite(largest: Sequence[Largest]) -> None:
    """Raise NonFiniteError, which names the first culprit, unless all tensors are finite.

    Raises
    ------
    geotucker.NonFiniteError
        If there is NaN or infinity.
    """
    values = _ops.floats([one.magnitude for one in largest])
    culprits = [one.name for one, v in zip(largest, values, strict=True) if not math.isfinite(v)]
    if culprits:
        raise gt.NonFiniteError(
            f"{culprits[0]}: expected finite numbers, got NaN or infinity. The step was undone; "
            "the usual causes are a learning rate that is too large and input that is not finite"
        )
