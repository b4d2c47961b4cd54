"""Nested containers as JSON and a flat dict of tensors, and back.

JSON and safetensors hold nothing that could execute code when it is read, as a pickle could.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._parts import is_sharded

__all__ = ["pack", "unpack"]


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
        Receives contiguous copies on the CPU, but what is in parts on several processes as it is.

    Raises
    ------
    TypeError
        If something in the tree is neither a strided tensor with values nor a plain value.

    Examples
    --------
    >>> flat = {}
    >>> node = pack({"step": 3, "core": torch.ones(2)}, "", flat)
    >>> unpack(node, flat)
    {'step': 3, 'core': tensor([1., 1.])}
    """
    if isinstance(tree, Tensor):
        _check_tensor(name, tree, tensors)
        whole = not is_sharded(tree)
        tensors[name] = tree.detach().cpu().contiguous().clone() if whole else tree.detach()
        return {"tensor": name}
    if isinstance(tree, dict):
        if not all(type(key) in (str, int) for key in tree):
            raise TypeError(
                f"{_title(name)}: expected keys that are strings or integers, got {list(tree)!r}"
            )
        kind = "counter" if isinstance(tree, Counter) else "dict"  # MultiStepLR keeps a Counter
        items = tree.items()
        return {kind: [[key, pack(value, _join(name, key), tensors)] for key, value in items]}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [pack(value, _join(name, i), tensors) for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(
        f"{_title(name)}: expected tensors, numbers, strings, booleans, None, and dicts, lists "
        f"and tuples of these, got {type(tree).__name__}; save its state_dict(), or what it can "
        "be built from"
    )


def unpack(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that `pack` described."""
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind in ("dict", "counter"):
        items = {key: unpack(value, tensors) for key, value in content}
        return items if kind == "dict" else Counter(items)
    values = [unpack(value, tensors) for value in content]
    return values if kind == "list" else tuple(values)


def _check_tensor(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> None:
    if name in tensors:
        raise TypeError(f"{_title(name)}: expected different names, got two tensors of this name")
    if tensor.is_meta or tensor.layout != torch.strided:
        got = "one on the meta device" if tensor.is_meta else f"one of layout {tensor.layout}"
        raise TypeError(f"{_title(name)}: expected a dense tensor with values, got {got}")


def _title(name: str) -> str:
    return name or "checkpoint"


def _join(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)
