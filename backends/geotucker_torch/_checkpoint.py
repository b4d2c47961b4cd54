"""Checkpoints: model, optimizer, scheduler and more, which load whole or not at all."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import geotucker as gt

from ._collectives import Group, all_objects, phase, together
from ._guard import untouched_if_loading_fails
from ._modules import check_model
from ._optimizer import TDLRT
from ._parts import group_of_parts, is_sharded
from ._peers import group_that_trains, is_first, telling
from ._sections import CheckpointError, read, write, write_together
from ._weights import load_weights

__all__ = ["CheckpointError", "load_checkpoint", "save_checkpoint"]


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    **extra: Any,
) -> None:
    """Write a training's state to one file, which replaces an older one in one step.

    A process that is killed at any moment leaves the old file or the new one, each whole. Between
    ``backward`` and ``step`` the layers are saved as they were before the backward pass: gradients
    are not saved. Of several processes that train the model together (see `TDLRT`) the first one
    writes, and the others return at once: call it on all of them, or on the first only.

    A model in parts on several processes (FSDP2) becomes a folder, in which each process writes its
    parts by ``torch.distributed.checkpoint``: call it on all that have parts, which need not be all
    there are. It is replaced as a file is.

    Parameters
    ----------
    path : str or path-like
        The file, or the folder of a model in parts; what contains it exists, and all processes see
        it. By custom a file ends in ``.safetensors``.
    model : nn.Module
        On any device; tensors are stored in their dtypes.
    optimizer : torch.optim.Optimizer, optional
        A `TDLRT` or any other.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
        Or whatever else has ``state_dict`` and ``load_state_dict``.
    **extra
        What else is needed to go on: tensors, numbers, strings, booleans, None, and dicts (keys:
        str or int), lists and tuples of these. For instance ``epoch=3``,
        ``rng=torch.get_rng_state()`` or ``scaler=scaler.state_dict()``. Of several processes those
        of the first are saved.

    Raises
    ------
    TypeError
        If something cannot be saved.
    OSError
        If the file cannot be written, or is a folder where a file is expected or the reverse. In
        both cases an older file is untouched, and of a model in parts it is so on all processes.
    ValueError
        If the model is in parts on other processes than `TDLRT` trains it on, or the optimizer is
        another and they are neither all processes nor on a mesh of one dimension.
    ProcessError
        If the model is in parts, and another process is lost.

    Examples
    --------
    >>> import tempfile, torch
    >>> from geotucker_torch import TuckerLinear, load_checkpoint, save_checkpoint
    >>> path = tempfile.mkdtemp() + "/checkpoint.safetensors"
    >>> model = TuckerLinear(6, 4, ranks=3)
    >>> save_checkpoint(path, model, epoch=7)
    >>> other = TuckerLinear(6, 4, ranks=1)
    >>> load_checkpoint(path, other), other.ranks
    ({'epoch': 7}, (3, 3))
    """
    check_model(model)
    parts = model, optimizer, scheduler, extra
    group = _group_of_parts(model, optimizer)
    with telling("checkpoint", model, optimizer):
        if group is not None:
            write_together(Path(path), parts, group)
        elif is_first(model, optimizer):
            write(Path(path), parts)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote, file or folder, all of it or nothing.

    The layers take the ranks that they find, the Parameter objects stay, and training goes on bit
    by bit as if it had never stopped (on the same machine, with the same data and random numbers).
    Nothing in the file can execute code. Weights are taken as by `load_weights`: a checkpoint of a
    dense model can be loaded into a factorised one, and the reverse. Files and folders know nothing
    of the number of processes, nor of what was in parts on them: both load into a model in parts on
    any number, and into a whole one on any or without torch.distributed. A process reads what it
    needs. Those that a `TDLRT` trains together load together: call it on all of them, with the
    optimizer.

    Parameters
    ----------
    path : str or path-like
        The file or folder.
    model : nn.Module, optional
        Of the architecture that was saved, at any ranks, on any device. Without it nothing is
        loaded, and the extras returned: settings, say, to build the model from. If it is in parts
        on several processes, call this on all that have parts.
    optimizer, scheduler : optional
        Of the kinds that were saved. Without them their state is left in the file.

    Returns
    -------
    dict of str to Any
        The extras, tensors on the CPU.

    Raises
    ------
    CheckpointError
        If the file is not a whole checkpoint, or does not fit; nothing is changed then, neither
        model nor optimizer nor scheduler. Of processes that load together that is so on all, should
        one of them not have the file, or have another.
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If the model is in parts on other processes: see `save_checkpoint`.
    ProcessError
        If another process is lost of those that load together.

    Examples
    --------
    >>> import tempfile, torch
    >>> from geotucker_torch import TuckerLinear, load_checkpoint, save_checkpoint
    >>> path = tempfile.mkdtemp() + "/checkpoint.safetensors"
    >>> save_checkpoint(path, TuckerLinear(6, 4), settings={"width": 6})
    >>> load_checkpoint(path)
    {'settings': {'width': 6}}
    """
    parts = {"optimizer": optimizer, "scheduler": scheduler}
    given = {name: part for name, part in parts.items() if part is not None}
    if model is None and given:
        raise TypeError("model: expected the model that was saved with the rest, got None")
    path = Path(path)
    if model is None:
        return read(path)["extra"]
    check_model(model)
    parted = _group_of_parts(model, optimizer)
    peers = optimizer.peers if isinstance(optimizer, TDLRT) else None
    joint = parted if peers is None else peers.group
    with (
        telling("checkpoint", model, optimizer),
        untouched_if_loading_fails(model, optimizer, scheduler),
    ):
        with _as_one(joint):
            content = read(path, model, given, parted)
            with _blamed_on(path, "model"):
                weights = _weights(content)
                _check_tensors(model, weights)
                load_weights(model, weights)
            for name, part in given.items():
                with _blamed_on(path, name):
                    part.load_state_dict(content[name]["state"])
        _check_same(path, content["sha256"], joint)
    extra: dict[str, Any] = content["extra"]
    return extra


def _group_of_parts(model: nn.Module, optimizer: Any) -> Group | None:
    """Return the processes that have the parts of a model, None if it is whole."""
    parts = [tensor for tensor in model.state_dict().values() if is_sharded(tensor)]
    return group_of_parts(parts, group_that_trains(model, optimizer)) if parts else None


@contextmanager
def _as_one(group: Group | None) -> Iterator[None]:
    """Have a block raise on all processes of a group or on none."""
    if group is None:
        yield
        return
    with phase("checkpoint"), together(group, CheckpointError):
        yield


def _check_same(path: Path, checksum: str, group: Group | None) -> None:
    """Raise CheckpointError on all processes of a group unless they have loaded the same."""
    if group is None:
        return
    with phase("checkpoint"):
        found = all_objects(checksum, group)
    others = [process for process, other in enumerate(found) if other != found[0]]
    if others:
        raise CheckpointError(
            f"{path}: expected the same checkpoint on all processes, got others than on process 0 "
            f"on {others}; load one that all of them see, or copy it to their machines"
        )


def _weights(content: Mapping[str, Any]) -> "OrderedDict[str, Any]":
    """Return the model's ``state_dict``, with the versions of its modules."""
    weights = OrderedDict(content["model"])
    weights._metadata = content["metadata"]  # type: ignore[attr-defined]
    return weights


def _check_tensors(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise TypeError where torch would convert, or load nothing, without an error."""
    for name, own in model.state_dict().items():
        saved = weights.get(name)
        if not (torch.is_tensor(own) and torch.is_tensor(saved)):
            continue
        if own.is_meta:
            raise TypeError(
                f"expected memory for {name!r}, got the meta device; call "
                "model.to_empty(device=...) first"
            )
        if own.dtype != saved.dtype:
            raise TypeError(
                f"expected {own.dtype} for {name!r}, got {saved.dtype}; convert the model before "
                f"it is loaded, with model.to({saved.dtype}), or afterwards"
            )


@contextmanager
def _blamed_on(path: Path, name: str) -> Iterator[None]:
    """Say which part of which file does not fit."""
    try:
        yield
    except (gt.GeotuckerError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit the {name} ({error})") from error
