"""NaN and infinity, looked for with one question to the device, which may answer later."""

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)

import geotucker as gt
from geotucker import _ops

from ._collectives import Group
from ._parts import is_sharded, largest_entry

__all__ = ["Largest", "Verdict", "check_finite", "largest_of"]

_CAUSES = "the usual causes are a learning rate that is too large and input that is not finite"


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
    names = [one.name for one in largest]
    if culprits := _culprits(names, _ops.floats([one.magnitude for one in largest])):
        raise gt.NonFiniteError(
            f"{culprits[0]}: expected finite numbers, got NaN or infinity. The step was undone; "
            f"{_CAUSES}"
        )


class Verdict:
    """Whether a step is finite, asked now and learnt when the device has come to it.

    Where it is not, the device takes the step back by itself.

    Parameters
    ----------
    largest : sequence of Largest
        On one device.
    changes : sequence of pairs of Tensor
        What the step has written, as it is now and as it was before.

    Examples
    --------
    >>> import torch
    >>> from geotucker_torch._finite import Verdict, largest_of
    >>> weight, before = torch.tensor([torch.nan]), torch.tensor([1.0])
    >>> verdict = Verdict(largest_of([("a gradient", weight)]), [(weight, before)])
    >>> weight
    tensor([1.])
    >>> verdict.check()
    Traceback (most recent call last):
    geotucker...NonFiniteError: a gradient: expected finite numbers, got NaN or infinity in the ...
    """

    def __init__(
        self, largest: Sequence[Largest], changes: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        self._names = [one.name for one in largest]
        scalars = [one.magnitude for one in largest]
        dtype = reduce(torch.promote_types, (scalar.dtype for scalar in scalars))
        magnitudes = torch.stack([scalar.to(dtype) for scalar in scalars])
        device = magnitudes.device
        finite = magnitudes.isfinite().all()
        _choose(finite, [(now, before) for now, before in changes if now.device == device])
        # Counters of steps, mostly: the host would wait if it were to write these now.
        self._elsewhere = [(now, before) for now, before in changes if now.device != device]
        waits = device.type != "cpu"
        self._magnitudes = torch.empty_like(magnitudes, device="cpu", pin_memory=waits)
        self._magnitudes.copy_(magnitudes, non_blocking=True)
        self._copied = torch.cuda.current_stream(device).record_event() if waits else None

    def hear(self) -> list[str]:
        """Return the names of what was not finite; from then on nothing of such a step is left."""
        if self._copied is not None:
            self._copied.synchronize()
        culprits = _culprits(self._names, self._magnitudes.tolist())
        if culprits:
            for now, before in self._elsewhere:
                now.copy_(before)
            self._elsewhere = []
        return culprits

    def check(self) -> None:
        """Raise NonFiniteError, which names the first culprit, unless all was finite."""
        if culprits := self.hear():
            raise gt.NonFiniteError(
                f"{culprits[0]}: expected finite numbers, got NaN or infinity in the step before. "
                f"That one changed nothing, and this one has not been taken; {_CAUSES}"
            )


# Integers of as many bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _choose(finite: Tensor, changes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Leave tensors as they are now, or make them what they were before if `finite` is False.

    By a few operations on their bits for all together: NaN times zero is NaN, its bits times zero
    are zero.
    """
    pairs = [(_real(now), _real(before)) for now, before in changes]
    for size, bits in _BITS.items():
        members = [pair for pair in pairs if pair[0].element_size() == size]
        if members:
            now, before = ([t.view(bits) for t in column] for column in zip(*members, strict=True))
            kept = _foreach_mul(before, (~finite).to(bits))
            _foreach_mul_(now, finite.to(bits))
            _foreach_add_(now, kept)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _culprits(names: Sequence[str], values: Sequence[float]) -> list[str]:
    return [name for name, v in zip(names, values, strict=True) if not math.isfinite(v)]
