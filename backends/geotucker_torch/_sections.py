"""What a checkpoint holds, by section: of a file all at once, of a folder what is asked for.

A file is a safetensors file. The model's tensors have their state-dict names, so that a file
without optimizer is also what ``safetensors.torch.load_file`` and ``model.load_state_dict`` take;
names of all other tensors begin with a dot, which no state-dict name does. Its metadata has one
key, "geotucker" (safetensors writes several in a random order), with JSON:

- ``format``: the number of this layout, raised whenever older readers would not understand it;
- ``version``: of the package that wrote it;
- ``sha256``: of all the rest and of the tensors, since safetensors has no checksum;
- ``content``: by section what `pack` says of it. Plain values are here, and so are the ranks of
  all layers over time (see `TDLRT.rank_history`); present ranks are the shapes of the cores.

A folder, of a model in parts on several processes, has the same JSON in its index, and there too

- ``tensors``: where they are, and the checksums of the files (see `_folder`).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
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
from ._optimizer import TDLRT
from ._parts import empty_parts, is_sharded, parts_of
from ._tree import pack, unpack

__all__ = ["FORMAT", "CheckpointError", "read", "write", "write_together"]

FORMAT = 1
_KEY = "geotucker"


class CheckpointError(gt.GeotuckerError, ValueError):
    """What is not a whole checkpoint, or not one of this model, optimizer or scheduler."""


def write(path: Path, parts: tuple[Any, ...]) -> None:
    """Write a file of a model, optimizer, scheduler and extras.

    Raises
    ------
    TypeError, OSError
    """
    if path.is_dir():  # before anything is copied
        raise IsADirectoryError(
            f"{path}: expected a file for a model that is whole, got a folder, as a model in parts "
            "is saved in; save to another path, or remove the folder if it is not needed any more"
        )
    content, tensors = _pack(*parts)
    about = {"format": FORMAT, "version": gt.__version__, "content": content}
    metadata = {_KEY: json.dumps({"sha256": _digest(about, tensors), **about})}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def write_together(path: Path, parts: tuple[Any, ...], group: Group) -> None:
    """Write a folder of those that a group's processes have in parts."""
    # Here, since they load torch.distributed.checkpoint.
    from ._folder import swept, write_index, write_tensors

    with phase("checkpoint"):
        with together(group, TypeError):
            content, tensors = _pack(*parts)
        with swept(path, group):
            place = write_tensors(path, tensors, group)
            about = {"format": FORMAT, "version": gt.__version__, "content": content}
            about["tensors"] = place
            write_index(path, {"sha256": _digest(about, {}), **about}, group)


def read(
    path: Path,
    model: nn.Module | None = None,
    given: Mapping[str, Any] | None = None,
    group: Group | None = None,
) -> dict[str, Any]:
    """Return the extras of a checkpoint that is whole, and what was saved of what is given.

    With them its checksum, which tells it from all others.

    Tensors are in parts where those of the model, or the parameters that they belong to, are.

    Parameters
    ----------
    path : Path
        File or folder.
    model : nn.Module, optional
    given : mapping of str to Any, optional
        Optimizer and scheduler, by section.
    group : torch.distributed.ProcessGroup, optional
        The processes that read together.

    Raises
    ------
    CheckpointError, OSError
    """
    folder, given = path.is_dir(), given or {}
    if not folder:
        with open(path, "rb"):  # what hinders this is the system's, what follows the file's fault
            pass
    sections = ["extra", *(() if model is None else ("model", "metadata")), *given]
    try:
        about, stored, fetch = _open_folder(path, group) if folder else _open_file(path)
        content = about["content"]
        for name, part in given.items():
            _check_kind(path, name, part, content[name])
        likes = {} if model is None else _likes(model, given.get("optimizer"), content, stored)
        tensors = fetch({name: likes.get(name) for name in stored if _section(name) in sections})
        found = {name: _unpack_section(content[name], tensors) for name in sections}
        return {"sha256": about["sha256"], **found}
    except CheckpointError:
        raise
    except (OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({error})") from error


# By name of a tensor what it is to be in parts like, None for whole ones.
_Fetch: TypeAlias = Callable[[Mapping[str, Tensor | None]], dict[str, Tensor]]


def _open_file(path: Path) -> tuple[Any, dict[str, Tensor], _Fetch]:
    """Return what is said, all tensors, and what takes some of them in parts."""
    with safetensors.safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        about = json.loads((file.metadata() or {})[_KEY])
        _check_format(path, about)
        # Clones lie in memory that torch allocated and aligned, as in a run that was never
        # interrupted: results of vectorised kernels may depend on the alignment.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118

    def fetch(likes: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        found = [(name, tensors[name], like) for name, like in likes.items()]
        return {name: t if like is None else parts_of(t, like) for name, t, like in found}

    _check_sum(about, tensors)
    return about, tensors, fetch


def _open_folder(path: Path, group: Group | None) -> tuple[Any, dict[str, Tensor], _Fetch]:
    """Return what is said, all tensors without values, and what reads some of them."""
    from ._folder import open_tensors, read_index, read_tensors

    about = read_index(path)
    _check_format(path, about)
    _check_sum(about, {})
    place = about["tensors"]
    tensors = open_tensors(path, place, group)

    def fetch(likes: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        found = [(name, tensors[name], like) for name, like in likes.items()]
        room = {
            name: torch.empty_like(t, device="cpu") if like is None else empty_parts(t, like)
            for name, t, like in found
        }
        read_tensors(path, place, room)
        return room

    return about, tensors, fetch


def _check_format(path: Path, about: Mapping[str, Any]) -> None:
    if about["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT} or older, got "
            f"{about['format']}, written by geotucker {about['version']}; upgrade geotucker"
        )


def _check_sum(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all that is said, and tensors, have the checksum that was saved."""
    rest = {key: value for key, value in about.items() if key != "sha256"}
    if about["sha256"] != _digest(rest, tensors):
        raise ValueError("its content does not have the checksum that was saved")


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


def _section(name: str) -> str:
    """Return what a tensor belongs to."""
    return name[1:].partition(".")[0] if name.startswith(".") else "model"


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


def _pack_state(part: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Describe the state of an optimizer or scheduler, and whose it is."""
    if part is None:
        return None
    return {"type": _kind(part), "state": pack(part.state_dict(), f".{name}", tensors)}


def _kind(part: Any) -> str:
    wrapped = f" of {_kind(part.wrapped)}" if isinstance(part, TDLRT) else ""
    return type(part).__name__ + wrapped


def _check_kind(path: Path, name: str, part: Any, saved: Any) -> None:
    """Raise CheckpointError unless a state of this kind of object was saved."""
    got = "none" if saved is None else f"that of {saved['type']}"
    if saved is None or saved["type"] != _kind(part):
        raise CheckpointError(f"{path}: {name}: expected the state of {_kind(part)}, got {got}")


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
