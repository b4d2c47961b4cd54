"""Tensors in parts on several processes, as ``fully_shard`` leaves them."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._collectives import Group, exchange

__all__ = ["empty_parts", "group_of_parts", "is_sharded", "largest_entry", "parts_of"]


def is_sharded(tensor: Any) -> bool:
    """Tell whether a tensor is in parts on several processes, and averaged by who did that."""
    tensors = sys.modules.get("torch.distributed.tensor")  # loaded where there are any
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def group_of_parts(parts: Sequence[Any], trains: Group | None) -> Group:
    """Return the group of the processes that have tensors in parts.

    Parameters
    ----------
    parts : sequence of DTensor
        Of one model; some may be on fewer processes than others.
    trains : torch.distributed.ProcessGroup or None
        The processes that are said to train it.

    Raises
    ------
    ValueError
        If these are others, or a group of those that have parts is not known.
    """
    meshes = {tensor.device_mesh for tensor in parts}
    meshes = {mesh for mesh in meshes if mesh.get_coordinate() is not None}  # with this process
    found = sorted({process for mesh in meshes for process in mesh.mesh.flatten().tolist()})
    known = [trains]
    if trains is None:
        known = [dist.group.WORLD, *(mesh.get_group() for mesh in meshes if mesh.ndim == 1)]
    for group in known:
        if sorted(dist.get_process_group_ranks(group)) == found:
            return group
    if trains is None:
        raise ValueError(
            "model: expected parts on all processes, or on a mesh of one dimension, got them on "
            f"processes {found} and a mesh of more; train with TDLRT(..., process_group=...)"
        )
    raise ValueError(
        f"model: expected parts on processes {dist.get_process_group_ranks(trains)}, on which "
        f"TDLRT trains it, got them on {found}; give TDLRT their process_group"
    )


@torch.no_grad()
def parts_of(whole: Tensor, like: Any) -> Tensor:
    """Return a tensor that every process has, in parts as `like` is. Nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    copies = DTensor.from_local(whole.to(like.device), mesh, [Replicate()] * mesh.ndim)
    return copies.redistribute(mesh, like.placements)


def empty_parts(whole: Tensor, like: Any) -> Tensor:
    """Return a tensor without values, of the shape and dtype of one, in parts as another is."""
    from torch.distributed.tensor import empty

    mesh, placements = like.device_mesh, like.placements
    return empty(*whole.shape, dtype=whole.dtype, device_mesh=mesh, placements=placements)


def largest_entry(tensor: Any, group: Group) -> Tensor:
    """Return the largest magnitude in all parts of a tensor, infinity if one is NaN.

    A ProcessError says where those of a group were, should one of them be lost.
    """
    from torch.distributed.tensor import DTensor, Partial

    mesh, part = tensor.device_mesh, tensor.to_local()  # which is empty where rows are few
    own = torch.linalg.vector_norm(part, math.inf) if part.numel() else part.new_zeros(())
    own = own.nan_to_num(math.inf, math.inf)  # the maximum of numbers and NaN may be a number
    parts = DTensor.from_local(own, mesh, [Partial("max")] * mesh.ndim)
    with exchange(group):
        return parts.full_tensor()
