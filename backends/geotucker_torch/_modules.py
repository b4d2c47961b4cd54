"""What the functions on whole models share."""

from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["aligned", "check_model", "has_hooks"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_model(model: Any) -> None:
    """Raise TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def has_hooks(module: nn.Module) -> bool:
    """Tell whether more happens in a call of the module than its class says."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Align text to the left and, behind column 3, numbers to the right."""
    aligned = [
        cell.rjust(width) if i > 3 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=False))
    ]
    return "  ".join([*aligned, cells[-1]]).rstrip()
