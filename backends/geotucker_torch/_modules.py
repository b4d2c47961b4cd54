"""What the functions on whole models share."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

import geotucker as gt

__all__ = [
    "Selection",
    "blamed_on",
    "check_model",
    "has_hooks",
    "replaced",
    "selector",
]

Selection: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_model(model: Any) -> None:
    """Raise TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


@contextmanager
def blamed_on(layer: str) -> Iterator[None]:
    """Name the layer in the errors of the core, which sees only a tensor."""
    try:
        yield
    except gt.GeotuckerError as error:
        raise type(error)(f"layer {layer!r}: {error}") from error


def has_hooks(module: nn.Module) -> bool:
    """Tell whether more happens in a call of the module than its class says."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def replaced(model: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put each successor wherever its predecessor is, in place; return the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in successors:
                setattr(parent, name, successors[child])
    _declare_ties(model)
    return successors.get(model, model)


def _declare_ties(model: nn.Module) -> None:
    """Name tied parameters anew where models of transformers name them, which save no others.

    Their ``_tied_weights_keys`` map patterns of what a file leaves out to what it has instead;
    before version 5 they are a list of such patterns.
    """
    module: Any
    for module in model.modules():
        keys = getattr(module, "_tied_weights_keys", None)
        if not keys:
            continue
        first: dict[nn.Parameter, str] = {}
        named = module.named_parameters(remove_duplicate=False)
        sources = {name: first.setdefault(parameter, name) for name, parameter in named}
        kept = [key for key in keys if any(re.search(key, name) for name in sources)]
        new = {
            name: source
            for name, source in sources.items()
            if name != source and not any(re.search(key, name) for key in kept)
        }
        if new:
            listed = isinstance(keys, list)
            module._tied_weights_keys = (
                [*kept, *new] if listed else {key: keys[key] for key in kept} | new
            )


def selector(
    argument: str, selection: Selection, default: bool
) -> Callable[[str, nn.Module], bool]:
    """Turn a selection of layers into a predicate; `default` is its value for None."""
    if selection is None:
        return lambda name, module: default
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str) else selection
    if not isinstance(patterns, Collection) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"{argument}: expected a pattern, several, or a predicate (name, module) -> bool, "
            f"got {selection!r}"
        )
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)
