"""Checkpoints in a folder, which processes write together and read each on its own.

Inside are ``checkpoint.json``, the index, and a folder that it names, with the tensors as
``torch.distributed.checkpoint`` writes them: of what is in parts each process its own. The index
is replaced last, in one step, and what it does not name is removed afterwards: whenever processes
are killed it names tensors that are whole, the old ones or the new. It has the checksums of their
files, which processes compute and compare between them.
"""

import hashlib
import json
import os
import pickle
import shutil
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ._collectives import Group, all_objects, object_of_first, together
from ._files import _sync_folder, write_atomically
from ._parts import is_sharded

__all__ = ["Index", "read_index", "read_tensors", "write_folder"]

_INDEX = "checkpoint.json"
_TENSORS = "tensors"
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


def write_folder(
    path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor], group: Group
) -> None:
    """Write a folder, all processes of a group together.

    Parameters
    ----------
    path : Path
        Replaced if it is such a folder already; what contains it exists.
    about : mapping of str to Any
        Of plain values; that of the first process is written.
    tensors : mapping of str to Tensor
        Of those that are not in parts the first process's are written.
    group : torch.distributed.ProcessGroup

    Raises
    ------
    OSError
        If the folder cannot be written, on any of them; what it held before is still there.
    """
    first = dist.get_rank(group) == 0
    name = object_of_first(f"{_TENSORS}-{uuid.uuid4().hex[:12]}", group)
    with together(group, OSError):
        if first:
            if path.is_file():
                raise FileExistsError(f"{path}: expected a folder for a model in parts, got a file")
            path.mkdir(exist_ok=True)
    own = tensors if first else {key: t for key, t in tensors.items() if is_sharded(t)}
    writer = FileSystemWriter(path / name)
    with together(group, OSError):
        try:
            save(dict(own), storage_writer=writer, process_group=group)
        except CheckpointException as error:  # on all of them alike
            reasons = (
                f"process {process}: {type(cause).__name__}: {cause}"
                for process, (cause, _) in error.failures.items()
            )
            raise OSError(f"{path}: {'; '.join(reasons)}") from error
    with together(group, OSError):
        names = [file.name for file in (path / name).iterdir()]
        share = _checksums(path / name, names, group)
    shares = all_objects(share, group)
    with together(group, OSError):
        if first:
            _sync_folder(path / name)
            files = {file: digest for share in shares for file, digest in share.items()}
            data = json.dumps({_TENSORS: {"folder": name, "files": files}, **about}).encode()
            write_atomically(path / _INDEX, data)
            for other in path.glob(f"{_TENSORS}-*"):
                if other.name != name:
                    shutil.rmtree(other)


class Index(NamedTuple):
    """What a folder holds.

    Parameters
    ----------
    about : dict of str to Any
        What `write_folder` was told.
    tensors : dict of str to Tensor
        On the meta device.
    folder : Path
        That they are in.
    """

    about: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path


def read_index(path: Path, group: Group | None) -> Index:
    """Return what a folder holds, having read the share of its files that this process checks.

    Parameters
    ----------
    path : Path
    group : torch.distributed.ProcessGroup or None
        The processes that read it together, None for one alone.

    Raises
    ------
    OSError, LookupError, TypeError, ValueError
        If that cannot be read, or the files are not those that were written.
    """
    about = json.loads((path / _INDEX).read_bytes())
    if not isinstance(about, dict):
        raise ValueError(f"expected a JSON object in {_INDEX}, got {type(about).__name__}")
    place = about.pop(_TENSORS)
    folder, files = path / place["folder"], place["files"]
    for name, digest in _checksums(folder, files, group).items():
        if digest != files[name]:
            raise ValueError(f"{folder.name}/{name} does not have the checksum that was saved")
    try:
        metadata = _Reader(folder).read_metadata()
        tensors = {
            key: torch.empty(found.size, dtype=found.properties.dtype, device="meta")
            for key, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
    except Exception as error:  # a broken pickle raises anything
        raise ValueError(f"{folder.name}: {error}") from error
    return Index(about, tensors, folder)


def read_tensors(index: Index, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors of the shapes that were saved; of those in parts, the part that is here.

    Raises
    ------
    OSError
        If files are missing, or are not what was written.
    """
    with warnings.catch_warnings():
        # Nothing is sent: each process reads what it needs. PyTorch warns of that.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            load(dict(tensors), storage_reader=_Reader(index.folder), no_dist=True)
        except CheckpointException as error:
            ((cause, _),) = error.failures.values()
            raise OSError(f"{type(cause).__name__}: {cause}") from error


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
        raise pickle.UnpicklingError(f"expected metadata of tensors, got {module}.{name}")
