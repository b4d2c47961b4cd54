"""The folder of a checkpoint, which processes write together and read each on its own.

Inside are ``checkpoint.json``, the index, and a folder that it names, with the tensors as
``torch.distributed.checkpoint`` writes them: of what is in parts each process its own. The index
is replaced last, in one step, and what it does not name is removed before and afterwards, also if
a save fails: whenever processes are killed it names tensors that are whole, the old or the new. It
has the checksums of their files, which processes compute and compare between them.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from geotucker._files import sync_folder

from ._collectives import Group, all_objects, exchange, object_of_first, together
from ._files import write_atomically
from ._parts import is_sharded

__all__ = ["open_tensors", "read_index", "read_tensors", "swept", "write_index", "write_tensors"]

_INDEX = "checkpoint.json"
_PREFIX = "tensors-"
_OURS = re.compile(_PREFIX + "[0-9a-f]{32}")
_BLOCK = 2**20  # bytes that are read at a time

# What the metadata of a folder of tensors is made of.
_METADATA = {
    (f"torch.distributed.checkpoint.{module}", name)
    for module, names in {
        "metadata": (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "filesystem": ("_StorageInfo",),
    }.items()
    for name in names
} | {("torch", "Size"), ("torch.serialization", "_get_layout")}


@contextmanager
def swept(path: Path, group: Group) -> Iterator[None]:
    """Leave in a folder no tensors but those that its index names, before a block and after it.

    What cannot be removed stays until the next save, and is no error.
    """
    first = dist.get_rank(group) == 0
    try:
        if first:
            _sweep(path)
        yield
    finally:
        if first:
            _sweep(path)


def _sweep(path: Path) -> None:
    try:
        named = read_index(path)["tensors"]["folder"]
    except FileNotFoundError:
        named = None
    except (OSError, LookupError, TypeError, ValueError):  # it may have named any of them
        return
    for other in path.glob(f"{_PREFIX}*"):
        if _OURS.fullmatch(other.name) and other.name != named:
            shutil.rmtree(other, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], group: Group) -> dict[str, Any]:
    """Write tensors beside those that a folder has, all processes of a group together.

    Parameters
    ----------
    path : Path
        The folder; what contains it exists.
    tensors : mapping of str to Tensor
        Of those that are not in parts the first process's are written.
    group : torch.distributed.ProcessGroup

    Returns
    -------
    dict of str to Any
        Plain values that say where they are.

    Raises
    ------
    OSError
        If they cannot be written, on any of the processes.
    """
    first = dist.get_rank(group) == 0
    name = object_of_first(f"{_PREFIX}{uuid.uuid4().hex}", group)
    with together(group, OSError):
        if first:
            if path.is_file():
                raise FileExistsError(f"{path}: expected a folder for a model in parts, got a file")
            path.mkdir(exist_ok=True)
    own = tensors if first else {key: t for key, t in tensors.items() if is_sharded(t)}
    with together(group, OSError):
        try:
            with exchange(group):  # what is not becomes a CheckpointException
                save(dict(own), storage_writer=FileSystemWriter(path / name), process_group=group)
        except CheckpointException as error:  # on all of them alike
            reasons = [
                f"process {process}: {type(cause).__name__}: {cause}"
                for process, (cause, _) in error.failures.items()
            ]
            raise OSError(f"{path}: {'; '.join(reasons)}") from error
    with together(group, OSError):
        share = _checksums(path / name, [file.name for file in (path / name).iterdir()], group)
    shares = all_objects(share, group)
    return {
        "folder": name,
        "files": {file: digest for own in shares for file, digest in own.items()},
    }


def write_index(path: Path, about: Mapping[str, Any], group: Group) -> None:
    """Replace the index of a folder by what the first process says.

    Raises
    ------
    OSError
        If it cannot be written; the folder holds what it held before.
    """
    with together(group, OSError):
        if dist.get_rank(group) == 0:
            name = about["tensors"]["folder"]
            sync_folder(path / name)
            write_atomically(path / _INDEX, json.dumps(about).encode())


def read_index(path: Path) -> dict[str, Any]:
    """Return what the index of a folder says.

    Raises
    ------
    OSError, ValueError
        If that cannot be read.
    """
    about = json.loads((path / _INDEX).read_bytes())
    if not isinstance(about, dict):
        raise ValueError(f"expected a JSON object in {_INDEX}, got {type(about).__name__}")
    return about


def open_tensors(path: Path, place: Mapping[str, Any], group: Group | None) -> dict[str, Tensor]:
    """Return the tensors of a folder on the meta device.

    Parameters
    ----------
    path : Path
        The folder.
    place : mapping of str to Any
        What `write_tensors` has returned.
    group : torch.distributed.ProcessGroup or None
        The processes that read them together, each of which checks a share of the files; None for
        one alone.

    Raises
    ------
    OSError, ValueError
        If files cannot be read, or are not those that were written.
    """
    folder, files = path / place["folder"], place["files"]
    for name, digest in _checksums(folder, files, group).items():
        if digest != files[name]:
            raise ValueError(f"{folder.name}/{name} does not have the checksum that was saved")
    try:
        found = _Reader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a broken pickle raises anything
        raise ValueError(f"{folder.name}/.metadata: {type(error).__name__}: {error}") from error
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(path: Path, place: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors of the shapes that were saved; of those in parts, the part that is here.

    Raises
    ------
    ValueError
        If files are not what was written.
    """
    # `torch.distributed.checkpoint.load` without what processes say to one another in it.
    reader, planner = _Reader(path / place["folder"]), DefaultLoadPlanner()
    try:
        metadata = reader.read_metadata()
        planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except Exception as error:  # whatever a broken file leads to
        raise ValueError(f"{place['folder']}: {type(error).__name__}: {error}") from error


def _checksums(folder: Path, names: Iterable[str], group: Group | None) -> dict[str, str]:
    """Return the checksums of this process's share of some files in a folder by name."""
    rank, world = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
    sums = {}
    for name in sorted(names)[rank::world]:
        digest = hashlib.sha256()
        with open(folder / name, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        sums[name] = digest.hexdigest()
    return sums


class _Reader(FileSystemReader):
    """Reads the metadata, which are a pickle, without running code from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":  # where it was written: nobody needs it
            return os.path.join
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _member
        raise pickle.UnpicklingError(f"expected metadata of tensors, got {module}.{name}")


def _member(kind: Any, name: str) -> Enum:
    """Return a member of an enumeration, which Python up to 3.11.3 pickles by its attribute."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"expected metadata of tensors, got an attribute of {kind!r}")
    return kind[name]
