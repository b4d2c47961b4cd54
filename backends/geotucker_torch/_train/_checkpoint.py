"""State of a run in one safetensors file: tensors as tensors, the rest as JSON.

One file needs one rename to be switched, so there is never half a checkpoint. Nothing in it
can execute code when it is read, which a pickle could.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ._errors import ResumeError
from ._files import write_atomically

__all__ = ["load_tree", "pack", "save_tree", "unpack"]

_KEY = "geotucker"  # one key only: safetensors writes several in a random order


def save_tree(path: Path, tree: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values, atomically.

    Raises
    ------
    TypeError
        If something in the tree is neither a tensor nor a plain value.
    OSError
        If the file cannot be written. An older file is untouched.
    """
    tensors: dict[str, Tensor] = {}
    structure = pack(tree, "", tensors)
    write_atomically(path, safetensors.torch.save(tensors, {_KEY: json.dumps(structure)}))


def load_tree(path: Path) -> Any:
    """Read what `save_tree` wrote; tensors come back on the CPU.

    Raises
    ------
    ResumeError
        If the file is not a whole checkpoint.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            structure = json.loads(file.metadata()[_KEY])
            # Clones lie in memory that torch allocated and aligned, as in a run that was never
            # interrupted: results of vectorised kernels may depend on the alignment.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return unpack(structure, tensors)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"{path}: not a whole checkpoint ({error})") from error


def pack(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a JSON description of a tree, moving its tensors into a flat dict.

    Parameters
    ----------
    tree : Any
        Nested dicts (keys: str or int), lists and tuples of tensors, numbers, strings,
        booleans and None.
    name : str
        Where the tree lies, for the tensors' names.
    tensors : dict of str to Tensor
        Receives contiguous copies on the CPU.

    Examples
    --------
    >>> import torch
    >>> flat = {}
    >>> node = pack({"step": 3, "core": torch.ones(2)}, "", flat)
    >>> unpack(node, flat)
    {'step': 3, 'core': tensor([1., 1.])}
    """
    if isinstance(tree, Tensor):
        if name in tensors:
            raise TypeError(f"two tensors would be called {name!r} in the checkpoint")
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(tree, dict):
        if not all(isinstance(key, (str, int)) for key in tree):
            raise TypeError(f"{name or 'checkpoint'}: a key is neither a string nor an integer")
        items = tree.items()
        return {"dict": [[key, pack(value, _join(name, key), tensors)] for key, value in items]}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [pack(value, _join(name, i), tensors) for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{name or 'checkpoint'}: cannot save a {type(tree).__name__}")


def unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the tree that `pack` described."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in content}
    values = [unpack(value, tensors) for value in content]
    return values if kind == "list" else tuple(values)


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)
