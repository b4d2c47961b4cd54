"""Checkpoints: model, optimizer, scheduler and more in one file, which loads whole or not at all.

(Of a model in parts on several processes in one folder, see `_folder`, whose index says the same.)

The file is a safetensors file. The model's tensors have their state-dict names, so that a file
without optimizer is also what ``safetensors.torch.load_file`` and ``model.load_state_dict`` take;
names of all other tensors begin with a dot, which no state-dict name does. Its metadata has one
key, "geotucker" (safetensors writes several in a random order), with JSON:

- ``format``: the number of this layout, raised whenever older readers would not understand it;
- ``version``: of the package that wrote it;
- ``sha256``: of all the rest and of the tensors, since safetensors has no checksum;
- ``content``: by section what `pack` says of it. Plain values are here, and so are the ranks of
  all layers over time (see `TDLRT.rank_history`); present ranks are the shapes of the cores.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import geotucker as gt

from ._collectives import Group, phase, together
from ._files import write_atomically
from ._guard import untouched_if_loading_fails
from ._modules import check_model
from ._optimizer import TDLRT
from ._parts import empty_parts, is_sharded, parts_of
from ._peers import group_that_trains, is_first
from ._tree import pack, unpack
from ._weights import load_weights

__all__ = ["FORMAT", "CheckpointError", "load_checkpoint", "save_checkpoint"]

FORMAT = 1
_KEY = "geotucker"


class CheckpointError(gt.GeotuckerError, ValueError):
    """A file or folder that is not a whole checkpoint, or not one of this model, optimizer ..."""


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
    parts by ``torch.distributed.checkpoint``: call it on all of them. It is replaced as a file is.

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
        If the file cannot be written. In both cases an older file is untouched, and of a model in
        parts it is so on all processes.
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
    group = _group_of_parts(model, optimizer)
    if group is None:
        if is_first(model, optimizer):
            content, tensors = _pack(model, optimizer, scheduler, extra)
            about = _about(content, tensors)
            metadata = {_KEY: json.dumps(about)}
            write_atomically(Path(path), safetensors.torch.save(tensors, metadata))
        return
    from ._folder import write_folder

    with phase("checkpoint", group):
        with together(group, TypeError):
            content, tensors = _pack(model, optimizer, scheduler, extra)
        write_folder(Path(path), _about(content, {}), tensors, group)


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
    needs.

    Parameters
    ----------
    path : str or path-like
        The file or folder.
    model : nn.Module, optional
        Of the architecture that was saved, at any ranks, on any device. Without it nothing is
        loaded, and the extras returned: settings, say, to build the model from. If it is in parts
        on several processes, call this on all of them.
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
        model nor optimizer nor scheduler. Of a model in parts that is so on all processes.
    OSError
        If there is no such file, or it cannot be read.
    ProcessError
        If the model is in parts, and another process is lost.

    Examples
    --------
    >>> import tempfile, torch
    >>> from geotucker_torch import TuckerLinear, load_checkpoint, save_checkpoint
    >>> path = tempfile.mkdtemp() + "/checkpoint.safetensors"
    >>> save_checkpoint(path, TuckerLinear(6, 4), settings={"width": 6})
    >>> load_checkpoint(path)
    {'settings': {'width': 6}}
    """
    given = {"optimizer": optimizer, "scheduler": scheduler}
    if model is not None:
        check_model(model)
    elif any(part is not None for part in given.values()):
        raise TypeError("model: expected the model that was saved with the rest, got None")
    path = Path(path)
    if model is None:
        return _read(path)["extra"]
    group = _group_of_parts(model, optimizer)
    with untouched_if_loading_fails(model, optimizer, scheduler), _as_one(group):
        content = _read(path, model, given, group)
        with _blamed_on(path, "model"):
            weights = _weights(content)
            _check_tensors(model, weights)
            load_weights(model, weights)
        for name, part in given.items():
            if part is not None:
                with _blamed_on(path, name):
                    part.load_state_dict(content[name]["state"])
    extra: dict[str, Any] = content["extra"]
    return extra


def _pack_state(part: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Describe the state of an optimizer or scheduler, and whose it is."""
    if part is None:
        return None
    return {"type": _kind(part), "state": pack(part.state_dict(), f".{name}", tensors)}


def _kind(part: Any) -> str:
    wrapped = f" of {_kind(part.wrapped)}" if isinstance(part, TDLRT) else ""
    return type(part).__name__ + wrapped


def _group_of_parts(model: nn.Module, optimizer: Any) -> Group | None:
    """Return the processes that have the parts of a model, None if it is whole."""
    if any(map(is_sharded, model.state_dict().values())):
        return group_that_trains(model, optimizer)
    return None


@contextmanager
def _as_one(group: Group | None) -> Iterator[None]:
    """Have a block raise on all processes of a group or on none."""
    if group is None:
        yield
        return
    with phase("checkpoint", group), together(group, CheckpointError):
        yield


def _pack(
    model: nn.Module, optimizer: Any, scheduler: Any, extra: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Describe everything by section, and return its tensors by name."""
    tensors: dict[str, Tensor] = {}
    state = model.state_dict()
    content = {
        "model": pack(state, "", tensors),
        "metadata": pack(getattr(state, "_metadata", None), ".metadata", tensors),
        "optimizer": _pack_state(optimizer, "optimizer", tensors),
        "scheduler": _pack_state(scheduler, "scheduler", tensors),
        "extra": pack(extra, ".extra", tensors),
    }
    return content, tensors


def _about(content: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    about = {"format": FORMAT, "version": gt.__version__, "content": content}
    return {"sha256": _digest(about, tensors), **about}


def _read(
    path: Path,
    model: nn.Module | None = None,
    given: Mapping[str, Any] | None = None,
    group: Group | None = None,
) -> dict[str, Any]:
    """Return the extras of a checkpoint that is whole, and the sections of what is given.

    Tensors are in parts where those of the model, or the parameters they belong to, are.
    """
    if not path.is_dir():
        with open(path, "rb"):  # what hinders this is the system's, what follows the file's fault
            pass
    given = {name: part for name, part in (given or {}).items() if part is not None}
    sections = ["extra", *(() if model is None else ("model", "metadata")), *given]
    with _whole(path):
        folder = path.is_dir()
        content, stored, read = _open_folder(path, group) if folder else _open_file(path)
        for name, part in given.items():
            _check_kind(path, name, part, content[name])
        likes = {} if model is None else _likes(model, given.get("optimizer"), content, stored)
        tensors = read({name: likes.get(name) for name in stored if _section(name) in sections})
        return {name: _unpack_section(content[name], tensors) for name in sections}


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({error})") from error


# By name of a tensor what it is to be in parts like, None for whole ones.
_Read: TypeAlias = Callable[[Mapping[str, Tensor | None]], dict[str, Tensor]]


def _open_file(path: Path) -> tuple[Any, dict[str, Tensor], _Read]:
    """Return the content, the tensors, and what takes some of them in parts."""
    with safetensors.safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        about = json.loads((file.metadata() or {})[_KEY])
        _check_format(path, about)
        # Clones lie in memory that torch allocated and aligned, as in a run that was never
        # interrupted: results of vectorised kernels may depend on the alignment.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118

    def read(likes: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        pairs = [(name, tensors[name], like) for name, like in likes.items()]
        return {name: t if like is None else parts_of(t, like) for name, t, like in pairs}

    return _checked(about, tensors), tensors, read


def _open_folder(path: Path, group: Group | None) -> tuple[Any, dict[str, Tensor], _Read]:
    """Return the content, tensors without values, and what reads some of them."""
    from ._folder import read_index, read_tensors  # these load torch.distributed.checkpoint

    index = read_index(path, group)
    _check_format(path, index.about)

    def read(likes: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        found = [(name, index.tensors[name], like) for name, like in likes.items()]
        room = {
            name: torch.empty_like(t, device="cpu") if like is None else empty_parts(t, like)
            for name, t, like in found
        }
        read_tensors(index, room)
        return room

    return _checked(index.about, {}), index.tensors, read


def _check_format(path: Path, about: Mapping[str, Any]) -> None:
    if about["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT} or older, got "
            f"{about['format']}, written by geotucker {about['version']}; upgrade geotucker"
        )


def _checked(about: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Return the content if it, and tensors, have the checksum that was saved."""
    if about.pop("sha256") != _digest(about, tensors):
        raise ValueError("its content does not have the checksum that was saved")
    return about["content"]


def _section(name: str) -> str:
    """Return what a tensor belongs to."""
    return name[1:].partition(".")[0] if name.startswith(".") else "model"


def _likes(
    model: nn.Module, optimizer: Optimizer | None, content: Any, stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return by name of a saved tensor one in parts, which it is to be like.

    Moments are in parts as their parameters are.
    """
    owners: dict[str, Any] = dict(model.state_dict())
    if optimizer is not None:
        # Names of the saved state begin with the number that it gives to a parameter.
        state = unpack(content["optimizer"]["state"], stored)
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        by_number = dict(zip(map(str, numbers), parameters, strict=False))
        prefix = ".optimizer.state."
        for name in stored:
            if name.startswith(prefix):
                owners[name] = by_number.get(name.removeprefix(prefix).partition(".")[0])
    return {
        name: owner
        for name, owner in owners.items()
        if name in stored and is_sharded(owner) and owner.dim() == stored[name].dim()
    }


def _unpack_section(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, dict) and "type" in node:
        return {"type": node["type"], "state": unpack(node["state"], tensors)}
    return unpack(node, tensors)


def _digest(about: Any, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def _check_kind(path: Path, name: str, part: Any, saved: Any) -> None:
    """Raise CheckpointError unless a state of this kind of object was saved."""
    got = "none" if saved is None else f"that of {saved['type']}"
    if saved is None or saved["type"] != _kind(part):
        raise CheckpointError(f"{path}: {name}: expected the state of {_kind(part)}, got {got}")


@contextmanager
def _blamed_on(path: Path, name: str) -> Iterator[None]:
    """Say which part of which file does not fit."""
    try:
        yield
    except (gt.GeotuckerError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit the {name} ({error})") from error
