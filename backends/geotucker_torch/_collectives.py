"""What processes that train one model say to one another, on torch.distributed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import geotucker as gt

from ._whereabouts import last_heard

__all__ = [
    "Part",
    "ProcessError",
    "all_equal",
    "all_objects",
    "average",
    "exchange",
    "fingerprint",
    "object_of_first",
    "phase",
    "together",
]

Group = Any  # torch.distributed.ProcessGroup: its name is missing where torch is built without


class ProcessError(gt.GeotuckerError, RuntimeError):
    """A process has lost the others: one was killed, has raised, is late, or does something else.

    The message says in which phase of the training this process was, and where the others were
    when they were last heard of, if they have met at a ``TCPStore`` that is still there.
    """


class Part(NamedTuple):
    """Tensors to be averaged together.

    Parameters
    ----------
    present : bool
        Whether this process has values. Without, the tensors say the shapes only.
    tensors : sequence of Tensor
        Of shapes and dtypes that are the same on all processes; at least one.
    """

    present: bool
    tensors: Sequence[Tensor]


@contextmanager
def exchange(group: Group) -> Iterator[None]:
    """Turn what torch.distributed raises when a process is lost into an error that says so.

    Only what processes say to one another belongs into the block: of plain RuntimeErrors, which
    gloo raises, nobody could tell otherwise whose they are. Those of subclasses that are not
    torch.distributed's, as for memory, pass.

    Raises
    ------
    ProcessError
    """
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
            raise
        raise ProcessError(
            f"process {dist.get_rank(group)} of {dist.get_world_size(group)} has lost the "
            "others. One was killed or has raised, or was later than the timeout of the process "
            f"group allows; see what it says itself. {last_heard(group)} Here: {error}"
        ) from error


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Have a ProcessError say in which phase of the training it was raised."""
    try:
        yield
    except ProcessError as error:
        error.args = (f"{name}: {error}",)
        raise


@contextmanager
def together(group: Group | None, kind: type[Exception]) -> Iterator[None]:
    """Have a block, in which processes do not wait for one another, fail on all or on none.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup or None
        With None this process is alone.
    kind : type of Exception
        Of the error on processes where the block went well; it says where it did not, and why.
    """
    try:
        yield
    except ProcessError:  # which all have, each its own
        raise
    except Exception as error:
        if group is not None:
            all_objects(f"{type(error).__name__}: {error}", group)
        raise
    reasons = [] if group is None else all_objects(None, group)
    for process, reason in enumerate(reasons):
        if reason is not None:
            raise kind(f"process {process} of {len(reasons)} failed ({reason})")


def average(parts: Sequence[Part], group: Group) -> list[list[Tensor] | None]:
    """Return the means over all processes, in one message for each dtype and device.

    What a process does not have counts as zeros, as the gradient of a layer that it has not used.

    Parameters
    ----------
    parts : sequence of Part
        As many, in the same order, on all processes.
    group : torch.distributed.ProcessGroup

    Returns
    -------
    list of list of Tensor or None
        By part the means, the same to the last bit on all processes; None if no process has any.
    """
    pieces = [
        piece
        for part in parts
        for piece in (
            part.tensors[0].new_full((1,), float(part.present)),
            *(t if part.present else torch.zeros_like(t) for t in part.tensors),
        )
    ]
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, piece in enumerate(pieces):
        kinds.setdefault((piece.dtype, piece.device), []).append(i)
    for members in kinds.values():
        flat = torch.cat([pieces[i].reshape(-1) for i in members])
        flat /= dist.get_world_size(group)  # before the sum, which might overflow
        with exchange(group):
            dist.all_reduce(flat, group=group)
        for i, mean in zip(members, flat.split([pieces[i].numel() for i in members]), strict=True):
            pieces[i] = mean.view(pieces[i].shape)
    means = iter(pieces)
    grouped = [(next(means), [next(means) for _ in part.tensors]) for part in parts]
    return [
        tensors if share > 0 else None
        for share, (_, tensors) in zip(_numbers([s for s, _ in grouped]), grouped, strict=True)
    ]


def all_equal(number: int, group: Group, device: torch.device) -> bool:
    """Tell whether all processes have the same integer of 62 bits; all get the same answer."""
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=device)
    with exchange(group):
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    largest, smallest = extremes.tolist()
    return bool(largest == -smallest)


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """Return a number of 62 bits that differs where shapes or any bits of matrices do.

    (But for chance: it is a sum of the bits as integers, which costs one pass over them. Tensors
    are taken as matrices whose rows are their first axis; the order of rows does not count.)

    Examples
    --------
    >>> fingerprint([torch.ones(2, 3)]) == fingerprint([torch.ones(2, 3)])
    True
    >>> fingerprint([torch.ones(2, 3)]) == fingerprint([torch.ones(3, 2)])
    False
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for tensor in tensors:
        rows = tensor.contiguous().view(integers[tensor.element_size()]).flatten(1)
        columns = rows.sum(0)  # by their place, so that bases in another order are others
        sums.append((columns * torch.arange(1, 2 * len(columns), 2, device=tensor.device)).sum())
    shapes = (n for t in tensors for n in (t.dim(), *t.shape))
    return hash((*_numbers(sums), *shapes)) & (2**62 - 1)


def _numbers(scalars: Sequence[Tensor]) -> list[Any]:
    """Return the values of tensors of one entry, with one question to the device."""
    if not scalars:
        return []
    values: list[Any] = torch.cat([s.reshape(1).to(scalars[0].device) for s in scalars]).tolist()
    return values


def object_of_first(value: Any, group: Group) -> Any:
    """Return the value that the first process of the group has; others may pass anything."""
    box = [value]
    with exchange(group):
        dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group)
    return box[0]


def all_objects(value: Any, group: Group) -> list[Any]:
    """Return the values of all processes, in their order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    with exchange(group):
        dist.all_gather_object(values, value, group)
    return values
