"""The fastest plain modules for inference: what becomes of each Tucker layer is measured.

Once the weights are fixed a Tucker layer is one of three chains of plain layers or the dense layer
(see `_plain`). Which of the four is fastest depends on machine, library and input more than on the
number of multiply-adds; so all are tried.

1. In a copy of the model a `_Probe` stands for each Tucker layer. When the model runs on the
   example, the probe times all chains on what the layer is given, where and as it is given.
2. The same is done once more with images stored channels last, which is another model to time:
   the format passes from layer to layer, so that it cannot be chosen for one of them.
3. The models of both formats are timed as a whole, beside their dense twins. The fastest is taken.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ._layers import TuckerConv2d, TuckerModule
from ._modules import check_model, replaced
from ._plain import (
    obstacle,
    parts,
    plain_module,
    settled_copy,
    tucker_layers,
    weight_readers,
)
from ._plan import CONTRACTIONS
from ._table import table
from ._transposed import TuckerConvTranspose2d

__all__ = ["Inference", "InferenceLayer", "candidates", "optimize_for_inference"]

DENSE = "dense"
_OF_IMAGES = (TuckerConv2d, TuckerConvTranspose2d)
# Shorter differences are noise: of two candidates so close the smaller one is taken.
_TIE = 1.03
# One reading of the clock covers at least so many seconds, which it resolves well.
_LEAST_SECONDS = 5e-4

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class InferenceLayer:
    """What became of one Tucker layer: a row of the table.

    Parameters
    ----------
    names : tuple of str
        Dotted names in the model, several if the module is shared; the root's name is "".
    type : str
        Name of the dense layer's class.
    shape, ranks : tuple of int
        Of the weight.
    seconds : mapping of str to float
        What each candidate took, all calls of the layer together; empty if none was timed.
    chosen : str
        Name of the candidate; empty if the layer stays as it is.
    reason : str
        What decided instead of the time, if anything did.
    """

    names: tuple[str, ...]
    type: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    seconds: Mapping[str, float]
    chosen: str
    reason: str = ""


@dataclass(frozen=True)
class Inference:
    """What `optimize_for_inference` did to a model; ``str()`` gives a table.

    Parameters
    ----------
    layers : tuple of InferenceLayer
        All Tucker layers, in the order of the model.
    seconds : mapping of str to float
        What one run of each whole model took; empty without Tucker layers.
    chosen : str
        Which of them was taken.
    """

    layers: tuple[InferenceLayer, ...]
    seconds: Mapping[str, float]
    chosen: str

    def __str__(self) -> str:
        """Return the table as plain text."""
        head = ("layer", "type", "shape", "ranks", "dense ms", "factored ms", "chosen")
        whole = (_milliseconds(self.seconds.get(name)) for name in (DENSE, self.chosen))
        sums = ("whole model", "", "", "", *whole, self.chosen)
        return table(head, [_cells(layer) for layer in self.layers], [sums])


def optimize_for_inference(
    model: nn.Module, example: Any, *, repeats: int = 10, verbose: bool = True
) -> nn.Module:
    """Return a copy for inference, with the fastest plain modules in place of Tucker layers.

    Each Tucker layer becomes a dense layer or an ``nn.Sequential`` of up to three, whichever is
    fastest on what the layer is given when the model runs on the example; then the whole is timed
    against a dense model, and taken only if it is faster. So the result is never slower than the
    dense model, on inputs like the example and on this machine with this number of threads. If
    every layer is replaced, it is made of plain ``torch.nn`` modules, to be saved, traced, exported
    or quantised as any other.

    Parameters
    ----------
    model : nn.Module
        Any model. It is not changed, and not run: copies are.
    example : Tensor, tuple, mapping, or any other
        A typical input: one argument, all positional arguments, or all keyword arguments.
    repeats : int
        How many times everything is timed; the shortest time counts.
    verbose : bool
        Whether the table is printed.

    Returns
    -------
    nn.Module
        The copy, in eval mode; none of its parameters asks for a gradient. A layer stays as it is,
        and the table says why, if the example does not reach it, if it has hooks, or if it does or
        holds more than a layer of this package. If its owner reads more of it than the output (its
        weight, say), it becomes the dense layer. Images may leave a convolution stored channels
        last, with the same values and shape.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If `repeats` is not a positive integer.

    Examples
    --------
    >>> model = nn.Sequential(TuckerConv2d(64, 64, 3, ranks=4), nn.ReLU())
    >>> x = torch.randn(2, 64, 8, 8)
    >>> fast = optimize_for_inference(model, x, repeats=1, verbose=False)
    >>> torch.allclose(fast(x), model(x), atol=1e-5)
    True
    """
    check_model(model)
    _check_repeats(repeats)
    original = _for_inference(model)
    with torch.no_grad(), _own_randomness(original):
        optimised, report = _optimised(original, _arguments(example), repeats)
    if verbose:
        print(report)
    return optimised


# The candidates


def candidates(layer: TuckerModule) -> dict[str, nn.Module]:
    """Return all plain modules that compute what the layer computes, by name.

    Parameters
    ----------
    layer : TuckerModule
        Of one of the types that this package brings.

    Returns
    -------
    dict of str to nn.Module
        In eval mode, without gradients, sharing nothing with the layer. ``"dense"`` comes first.

    Examples
    --------
    >>> list(candidates(TuckerConv2d(9, 8, 3, ranks=2)))
    ['dense', 'project-kernel-spread', 'kernel-spread', 'project-kernel']
    """
    *chains, folded = CONTRACTIONS
    titles = {DENSE: folded, **{"-".join(parts(order)): order for order in chains}}
    return {
        title: plain_module(layer, order).eval().requires_grad_(False)
        for title, order in titles.items()
    }


# The choice


class _Probe(nn.Module):
    """Stands for a layer and times its candidates on what it is given."""

    def __init__(self, modules: dict[str, nn.Module], repeats: int) -> None:
        super().__init__()
        self.dense = modules[DENSE]
        # A list of its own, so that parameters are found once.
        self.candidates = list(modules.items())
        self.repeats = repeats
        self.measured: dict[Any, dict[str, float]] = {}
        self.calls: Counter[Any] = Counter()
        self.was_read = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the dense layer returns; inputs of one kind are timed once."""
        kind = tuple(map(_kind, (*args, *kwargs.values())))
        if kind not in self.measured:
            self.measured[kind] = measure(
                {name: _call(module, (args, kwargs)) for name, module in self.candidates},
                self.repeats,
            )
        self.calls[kind] += 1
        return self.dense(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Take note if somebody wants more of the layer than its output."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.dense, name)
            self.was_read = True
            return found

    @property
    def seconds(self) -> dict[str, float]:
        """What each candidate takes in one run of the model; empty if nothing came by."""
        names = [name for name, _ in self.candidates] if self.calls else []
        return {
            name: sum(n * self.measured[kind][name] for kind, n in self.calls.items())
            for name in names
        }


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return type(value)


@dataclass(frozen=True)
class _Version:
    """One of the models among which the last choice is made."""

    title: str
    channels_last: bool
    modules: dict[str, nn.Module]  # by the first name of the layer that they replace
    rows: tuple[InferenceLayer, ...]
    parameters: int  # of what is replaced

    def build(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with the modules in it."""
        new = copy.deepcopy(model)
        layers = {new.get_submodule(name): module for name, module in self.modules.items()}
        new = replaced(new, layers)
        if self.channels_last:
            _store_channels_last(new)
        return new


def _optimised(model: nn.Module, arguments: Arguments, repeats: int) -> tuple[nn.Module, Inference]:
    """Time everything and return the fastest model, made from `model`, which is not run."""
    layers = tucker_layers(model)
    if not layers:
        return model, Inference((), {}, "as it is")
    _call(copy.deepcopy(model), arguments)()  # the model's own error, if it takes no such example
    versions = _versions(model, layers, arguments, repeats, channels_last=False)
    if any(isinstance(layer, _OF_IMAGES) for layer in layers.values()):
        with suppress(RuntimeError):  # the model may take views that contiguous images allow
            versions += _versions(model, layers, arguments, repeats, channels_last=True)
    models = {v.title: v.build(model) for v in versions}
    seconds = measure({title: _call(m, arguments) for title, m in models.items()}, repeats)
    chosen = _fastest(seconds, {v.title: v.parameters for v in versions})
    version = next(v for v in versions if v.title == chosen)
    return version.build(model), Inference(version.rows, seconds, chosen)


def _versions(
    model: nn.Module,
    layers: dict[tuple[str, ...], TuckerModule],
    arguments: Arguments,
    repeats: int,
    channels_last: bool,
) -> list[_Version]:
    """Time the layers in one format; return the dense model and the one of the best layers."""
    options = {
        names[0]: candidates(layer) for names, layer in layers.items() if not obstacle(layer)
    }
    if channels_last:
        for module in (module for found in options.values() for module in found.values()):
            _store_channels_last(module)
    probes = {name: _Probe(modules, repeats) for name, modules in options.items()}
    probed = _Version("", channels_last, dict(probes), (), 0).build(model)
    _call(probed, arguments)()
    readers = weight_readers(model)
    versions = []
    for title, dense_only in ((DENSE, True), ("factored", False)):
        rows = tuple(
            _row(names, layer, probes.get(names[0]), dense_only, layer in readers)
            for names, layer in layers.items()
        )
        if versions and rows == versions[0].rows:
            continue
        modules = {row.names[0]: options[row.names[0]][row.chosen] for row in rows if row.chosen}
        title += ", channels last" if channels_last else ""
        size = sum(map(_count, modules.values()))
        versions.append(_Version(title, channels_last, modules, rows, size))
    return versions


def _row(
    names: tuple[str, ...],
    layer: TuckerModule,
    probe: _Probe | None,
    dense_only: bool,
    has_reader: bool,
) -> InferenceLayer:
    """Decide about a layer."""
    seconds, chosen, reason = {}, "", obstacle(layer)
    if probe is not None:
        seconds = probe.seconds
        if has_reader or probe.was_read:
            chosen, reason = DENSE, "its owner reads more than the output"
        elif not seconds:
            reason = "the example does not reach it"
        elif dense_only:
            chosen = DENSE
        else:
            chosen = _fastest(seconds, {name: _count(m) for name, m in probe.candidates})
    kind = layer.dense_type.__name__
    return InferenceLayer(names, kind, layer.shape, layer.ranks, seconds, chosen, reason)


def _fastest(seconds: Mapping[str, float], sizes: Mapping[str, int]) -> str:
    """Return the smallest of those that are as fast as the fastest."""
    limit = _TIE * min(seconds.values())
    fast = [name for name in seconds if seconds[name] <= limit]
    return min(fast, key=lambda name: (sizes[name], seconds[name]))


def measure(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the shortest time that one call of each function took, in seconds.

    The functions take turns, so that a machine that is busy for a while is so for all of them;
    and as such things only ever add to a time, the shortest one counts.
    """
    for function in functions.values():  # libraries set up themselves at first
        function()
    first = {name: _seconds(function, 1) for name, function in functions.items()}
    number = max(1, math.ceil(_LEAST_SECONDS / max(min(first.values()), 1e-7)))
    best = dict.fromkeys(functions, math.inf)
    for _ in range(repeats):
        for name, function in functions.items():
            best[name] = min(best[name], _seconds(function, number) / number)
    return best


def _seconds(function: Callable[[], Any], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        function()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


# Models


def _for_inference(model: nn.Module) -> nn.Module:
    """Copy a model, in eval mode and without gradients."""
    return settled_copy(model).eval().requires_grad_(False)


def _store_channels_last(model: nn.Module) -> None:
    """Store the kernels of convolutions over images so; activations follow them."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _arguments(example: Any) -> Arguments:
    if isinstance(example, Mapping):
        return (), {name: _own(value) for name, value in example.items()}
    # PyTorch's packed sequences are tuples by inheritance, and one argument.
    return tuple(map(_own, example if type(example) is tuple else (example,))), {}


def _own(value: Any) -> Any:
    """Copy a tensor, as models may write into what they are given."""
    return value.clone() if isinstance(value, Tensor) else value


def _call(module: nn.Module, arguments: Arguments) -> Callable[[], Any]:
    args, kwargs = arguments
    return lambda: module(*args, **kwargs)


@contextmanager
def _own_randomness(model: nn.Module) -> Iterator[None]:
    """Keep the random generators as they are, whatever the model draws."""
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng(sorted(d.index for d in devices), device_type=kind):
        yield


def _check_repeats(repeats: Any) -> None:
    if isinstance(repeats, bool) or not isinstance(repeats, Integral) or repeats < 1:
        raise ValueError(f"repeats: expected a positive integer, got {repeats!r}")


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _cells(layer: InferenceLayer) -> Sequence[str]:
    name = " = ".join(text or "(the model)" for text in layer.names)
    chains = [seconds for title, seconds in layer.seconds.items() if title != DENSE]
    times = _milliseconds(layer.seconds.get(DENSE)), _milliseconds(min(chains, default=None))
    remark = ": ".join(filter(None, (layer.chosen or "as it is", layer.reason)))
    return (name, layer.type, str(layer.shape), str(layer.ranks), *times, remark)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"
