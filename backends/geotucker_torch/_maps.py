"""The linear maps that a Tucker layer is made of, and their derivatives, by kind of layer.

A layer's map is a chain ``x -> a -> b -> y``: the input factor takes the channels of ``x`` to
those of ``a``, a small kernel takes ``a`` to ``b``, the output factor spreads the channels of
``b`` over those of ``y``. Either factor may be folded into the kernel instead (see `_plan`).
`LinearMap` and `ConvMap` say what these three are, with their adjoints and with the gradients of
their matrices; whatever trains or contracts a layer is written once, in these terms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from geotucker import ShapeError

from ._plan import Contraction, Sizes

__all__ = [
    "CONV",
    "KERNEL_GRADIENT",
    "ConvMap",
    "LayerMap",
    "LinearMap",
    "core_turned",
    "modes_turned",
]

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KERNEL_GRADIENT: dict[int, Callable[..., Tensor]] = {
    1: grad.conv1d_weight,
    2: grad.conv2d_weight,
    3: grad.conv3d_weight,
}
_INPUT_GRADIENT: dict[int, Callable[..., Tensor]] = {
    1: grad.conv1d_input,
    2: grad.conv2d_input,
    3: grad.conv3d_input,
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes
_PAD_MODE = {"zeros": "constant"}  # the names of nn.ConvNd -> those of F.pad, where they differ
_T = TypeVar("_T")
# From so many positions on a batched product of matrices beats a convolution with a kernel of one
# entry, up to four times on one core (measured; on less it may lose by ten).
_MANY_POSITIONS = 32


class LayerMap(Protocol):
    """What the algorithms need of a kind of layer.

    ``order`` says which channels are projected. Kernels have the axes (out, in, k_1, ...), whatever
    the order of the axes of the layer's weight.
    """

    # Whether the weight's first axis belongs to the input and its second to the output.
    transposed: ClassVar[bool]

    def sizes(self, x: Tensor, core: Tensor, u_out: Tensor, u_in: Tensor) -> Sizes:
        """Return all that the planner wants to know."""
        ...

    def check(self, x: Tensor, in_channels: int) -> None:
        """Raise ShapeError unless the layer can take `x`."""
        ...

    def enter(self, x: Tensor) -> Tensor:
        """Bring the layer's input into the form that the others take."""
        ...

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        """Bring an output back into the form that belongs to the layer's input `x`."""
        ...

    def enter_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """Bring the gradient of the output into the form of the outputs here."""
        ...

    def leave_gradient(self, d: Tensor, x: Tensor) -> Tensor:
        """Bring the gradient of what `enter` returned back to the layer's input `x`."""
        ...

    def project_input(self, x: Tensor, u_in: Tensor) -> Tensor:
        """Apply ``u_in^T`` to the input's channels."""
        ...

    def spread_input(self, d: Tensor, k_in: Tensor) -> Tensor:
        """Apply ``k_in``, the adjoint of `project_input`."""
        ...

    def input_factor_gradient(self, x: Tensor, d: Tensor) -> Tensor:
        """Return the gradient of the factor of `project_input`: sum of ``x d^T``."""
        ...

    def apply(self, a: Tensor, kernel: Tensor, bias: Tensor | None, order: Contraction) -> Tensor:
        """Apply the kernel."""
        ...

    def input_gradient(self, h: Tensor, kernel: Tensor, a: Tensor, order: Contraction) -> Tensor:
        """Return the adjoint of `apply`, for an `a` of any channels that the kernel has."""
        ...

    def kernel_gradient(self, a: Tensor, h: Tensor, order: Contraction) -> Tensor:
        """Return the gradient of the kernel, of shape (channels of h, channels of a, ...)."""
        ...

    def spread_output(self, b: Tensor, k_out: Tensor, bias: Tensor | None) -> Tensor:
        """Apply ``k_out`` to the channels of `b`."""
        ...

    def project_output(self, g: Tensor, u_out: Tensor) -> Tensor:
        """Apply ``u_out^T``, the adjoint of `spread_output`."""
        ...

    def output_factor_gradient(self, g: Tensor, b: Tensor) -> Tensor:
        """Return the gradient of the factor of `spread_output`: sum of ``g b^T``."""
        ...

    def bias_gradient(self, g: Tensor) -> Tensor:
        """Return the gradient of the bias."""
        ...

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """Put projected channels side by side, as if projected together."""
        ...


def core_turned(layer_map: LayerMap, core: Tensor) -> Tensor:
    """Bring the axes of a core from the order of the weight into that of kernels, or back."""
    return core.transpose(0, 1) if layer_map.transposed else core


def modes_turned(layer_map: LayerMap, modes: Sequence[_T]) -> list[_T]:
    """Bring what there is one of per mode into the order of kernels, or back."""
    return [modes[1], modes[0], *modes[2:]] if layer_map.transposed else list(modes)


@dataclass(frozen=True)
class LinearMap:
    """The maps of ``nn.Linear``; activations have shape (..., channels)."""

    transposed: ClassVar[bool] = False

    def sizes(self, x: Tensor, core: Tensor, u_out: Tensor, u_in: Tensor) -> Sizes:
        """See `LayerMap`."""
        batch = math.prod(x.shape[:-1])
        return Sizes(u_out.shape[0], u_in.shape[0], core.shape[0], core.shape[1], batch)

    def check(self, x: Tensor, in_channels: int) -> None:
        """See `LayerMap`."""
        if x.dim() == 0 or x.shape[-1] != in_channels:
            raise ShapeError(
                f"x: expected a last dimension of {in_channels} features, got shape "
                f"{tuple(x.shape)}"
            )

    def enter(self, x: Tensor) -> Tensor:
        """See `LayerMap`."""
        return x

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`."""
        return y

    def enter_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`."""
        return g

    def leave_gradient(self, d: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`."""
        return d

    def project_input(self, x: Tensor, u_in: Tensor) -> Tensor:
        """See `LayerMap`."""
        return F.linear(x, u_in.t())

    def spread_input(self, d: Tensor, k_in: Tensor) -> Tensor:
        """See `LayerMap`."""
        return F.linear(d, k_in)

    def input_factor_gradient(self, x: Tensor, d: Tensor) -> Tensor:
        """See `LayerMap`."""
        return _outer(x, d)

    def apply(self, a: Tensor, kernel: Tensor, bias: Tensor | None, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        return F.linear(a, kernel, bias)

    def input_gradient(self, h: Tensor, kernel: Tensor, a: Tensor, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        return F.linear(h, kernel.t())

    def kernel_gradient(self, a: Tensor, h: Tensor, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        return _rows(h).t() @ _rows(a)

    def spread_output(self, b: Tensor, k_out: Tensor, bias: Tensor | None) -> Tensor:
        """See `LayerMap`."""
        return F.linear(b, k_out, bias)

    def project_output(self, g: Tensor, u_out: Tensor) -> Tensor:
        """See `LayerMap`."""
        return F.linear(g, u_out.t())

    def output_factor_gradient(self, g: Tensor, b: Tensor) -> Tensor:
        """See `LayerMap`."""
        return _outer(g, b)

    def bias_gradient(self, g: Tensor) -> Tensor:
        """See `LayerMap`."""
        return _rows(g).sum(0)

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """See `LayerMap`."""
        return torch.cat([first, second], -1)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _outer(wide: Tensor, narrow: Tensor) -> Tensor:
    """Sum ``wide narrow^T`` over rows; a product with the narrow one first takes half the time."""
    return (_rows(narrow).t() @ _rows(wide)).t()


@dataclass(frozen=True)
class ConvMap:
    """The maps of ``nn.ConvNd``; activations have shape (batch, groups * channels, *positions).

    Groups share ``U_in`` and the kernel; group g has its own block of rows of ``U_out``. Where the
    output is projected the groups are laid in the batch dimension, so that one small
    kernel serves them all. A factor that acts on channels commutes with padding, so that it is
    the projected activation, with fewer channels, which is padded.

    Parameters
    ----------
    kernel, stride, dilation : tuple of int
        One entry per spatial dimension.
    padding : tuple of int, "same" or "valid"
    groups : int
    padding_mode : str
        As for ``nn.ConvNd``.
    """

    transposed: ClassVar[bool] = False

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        stride: int | Sequence[int],
        padding: int | str | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        padding_mode: str,
    ) -> "ConvMap":
        """Build the map, with single numbers spread over all spatial dimensions."""
        order = len(kernel)
        pads = padding if isinstance(padding, str) else _each(padding, order)
        sides = _each(stride, order), pads, _each(dilation, order)
        return cls(tuple(kernel), *sides, groups, padding_mode)

    @property
    def pads(self) -> list[tuple[int, int]]:
        """Padding before and after each spatial dimension; "same" may be uneven."""
        if self.padding == "valid":
            return [(0, 0)] * len(self.kernel)
        if self.padding == "same":
            totals = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        assert not isinstance(self.padding, str)
        return [(pad, pad) for pad in self.padding]

    @property
    def skip(self) -> list[int]:
        """Strides across kernels of one entry: the positions between are seen by nobody."""
        extents = zip(self.stride, self.kernel, self.pads, strict=True)
        return [s if k == 1 and p == (0, 0) else 1 for s, k, p in extents]

    @property
    def stride_left(self) -> list[int]:
        """What is left of the stride after `enter`."""
        return [1 if skip > 1 else s for s, skip in zip(self.stride, self.skip, strict=True)]

    def sizes(self, x: Tensor, core: Tensor, u_out: Tensor, u_in: Tensor) -> Sizes:
        """See `LayerMap`; `x` is as `enter` returns it."""
        # PyTorch raises where the kernel does not fit: no positions are left then.
        sides = x.shape[2:], self.kernel, self.stride_left, self.pads, self.dilation
        extents = zip(*sides, strict=True)
        out = [max(0, (n + sum(p) - d * (k - 1) - 1) // s + 1) for n, k, s, p, d in extents]
        return Sizes(
            u_out.shape[0],
            u_in.shape[0],
            core.shape[0],
            core.shape[1],
            batch=x.shape[0],
            groups=self.groups,
            kernel=math.prod(self.kernel),
            positions_in=math.prod(x.shape[2:]),
            positions_out=math.prod(out),
        )

    def check(self, x: Tensor, in_channels: int) -> None:
        """Raise ShapeError unless the layer can take `x`."""
        order, channels = len(self.kernel), self.groups * in_channels
        if x.dim() not in (order + 1, order + 2) or x.shape[-order - 1] != channels:
            sides = ", ".join(f"n_{i + 1}" for i in range(order))
            raise ShapeError(
                f"x: expected shape (batch, {channels}, {sides}) or ({channels}, {sides}), "
                f"got {tuple(x.shape)}"
            )

    def enter(self, x: Tensor) -> Tensor:
        """See `LayerMap`: with a batch dimension, without positions that a stride skips."""
        x = x.unsqueeze(0) if self._unbatched(x) else x
        skip = self.skip
        return x if max(skip) == 1 else x[(..., *(slice(None, None, s) for s in skip))]

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`."""
        return y.squeeze(0) if self._unbatched(x) else y

    def enter_gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`."""
        return g.unsqueeze(0) if self._unbatched(x) else g

    def leave_gradient(self, d: Tensor, x: Tensor) -> Tensor:
        """See `LayerMap`: the positions that were skipped get zeros."""
        skip = self.skip
        if max(skip) > 1:
            spatial = x.shape[-len(skip) :]
            full = d.new_zeros(*d.shape[:2], *spatial)
            full[(..., *(slice(None, None, s) for s in skip))] = d
            d = full
        return d.squeeze(0) if self._unbatched(x) else d

    def project_input(self, x: Tensor, u_in: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.together(_pointwise(self.apart(x), u_in.t()))

    def spread_input(self, d: Tensor, k_in: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.together(_pointwise(self.apart(d), k_in))

    def input_factor_gradient(self, x: Tensor, d: Tensor) -> Tensor:
        """See `LayerMap`."""
        return _correlate(self.apart(x), self.apart(d))

    def apply(self, a: Tensor, kernel: Tensor, bias: Tensor | None, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        a, padding = self._padded(a)
        options = (self.stride_left, padding, self.dilation)
        if order.project_output:
            return self.together(CONV[self._order](self.apart(a), kernel, bias, *options, groups=1))
        return CONV[self._order](a, kernel, bias, *options, groups=self.groups)

    def input_gradient(self, h: Tensor, kernel: Tensor, a: Tensor, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        like = a.new_empty(()).expand(a.shape[0], self.groups * kernel.shape[1], *a.shape[2:])
        padding = self._own_padding
        if padding is None:  # through the adjoint of a padding of its own
            return self._unpad(lambda p: self._input_gradient(h, kernel, p.shape, 0, order), like)
        return self._input_gradient(h, kernel, like.shape, padding, order)

    def _input_gradient(
        self,
        h: Tensor,
        kernel: Tensor,
        shape: Sequence[int],
        padding: int | Sequence[int],
        order: Contraction,
    ) -> Tensor:
        gradient, kernel = _INPUT_GRADIENT[self._order], _laid_out(kernel, h)
        if not order.project_output or self.groups == 1:
            return gradient(
                shape, kernel, h, self.stride_left, padding, self.dilation, groups=self.groups
            )
        apart = [shape[0] * self.groups, shape[1] // self.groups, *shape[2:]]
        d = gradient(apart, kernel, self.apart(h), self.stride_left, padding, self.dilation)
        return self.together(d)

    def kernel_gradient(self, a: Tensor, h: Tensor, order: Contraction) -> Tensor:
        """See `LayerMap`."""
        a, padding = self._padded(a)
        groups = self.groups
        if order.project_output:
            a, h, groups = self.apart(a), self.apart(h), 1
        shape = (h.shape[1], a.shape[1] // groups, *self.kernel)
        return KERNEL_GRADIENT[self._order](
            a, shape, h, self.stride_left, padding, self.dilation, groups
        )

    def spread_output(self, b: Tensor, k_out: Tensor, bias: Tensor | None) -> Tensor:
        """See `LayerMap`."""
        if self.groups == 1:
            return _pointwise(b, k_out, bias)
        return self._blockwise(self._blocks(k_out), b, bias)

    def project_output(self, g: Tensor, u_out: Tensor) -> Tensor:
        """See `LayerMap`."""
        if self.groups == 1:
            return _pointwise(g, u_out.t())
        return self._blockwise(self._blocks(u_out).mT, g)

    def output_factor_gradient(self, g: Tensor, b: Tensor) -> Tensor:
        """See `LayerMap`."""
        if self.groups == 1:
            return _correlate(g, b)
        size = self.groups
        g, b = (t.reshape(len(t), size, t.shape[1] // size, math.prod(t.shape[2:])) for t in (g, b))
        return (g @ b.mT).sum(0).flatten(0, 1)

    def bias_gradient(self, g: Tensor) -> Tensor:
        """See `LayerMap`."""
        return g.sum([0, *range(2, g.dim())])

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """See `LayerMap`."""
        return self.together(torch.cat([self.apart(first), self.apart(second)], 1))

    @property
    def _order(self) -> int:
        return len(self.kernel)

    @property
    def _own_padding(self) -> list[int] | None:
        """The padding that a convolution can do by itself, or None if it cannot."""
        pads = self.pads
        if self.padding_mode != "zeros" or any(left != right for left, right in pads):
            return None
        return [left for left, _ in pads]

    def _padded(self, a: Tensor) -> tuple[Tensor, list[int]]:
        """Pad what the convolution cannot pad by itself; return the padding that is left to it."""
        padding = self._own_padding
        if padding is not None:
            return a, padding
        sides = [side for pair in reversed(self.pads) for side in pair]  # F.pad: last axis first
        mode = _PAD_MODE.get(self.padding_mode, self.padding_mode)
        return F.pad(a, sides, mode=mode), [0] * self._order

    def _unpad(self, gradient: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """Apply the adjoint of the padding to the gradient of what it gives."""
        with torch.enable_grad():
            a = torch.zeros_like(like, memory_format=torch.contiguous_format).requires_grad_()
            padded, _ = self._padded(a)
        (d,) = torch.autograd.grad(padded, a, gradient(padded))
        return d

    def _unbatched(self, x: Tensor) -> bool:
        return x.dim() == self._order + 1

    def apart(self, x: Tensor) -> Tensor:
        """Lay the groups in the batch dimension."""
        if self.groups == 1:  # a reshape would copy activations that are stored channels last
            return x
        return x.reshape(x.shape[0] * self.groups, x.shape[1] // self.groups, *x.shape[2:])

    def together(self, x: Tensor) -> Tensor:
        """Lay the groups side by side among the channels."""
        if self.groups == 1:
            return x
        return x.reshape(x.shape[0] // self.groups, x.shape[1] * self.groups, *x.shape[2:])

    def _blocks(self, u_out: Tensor) -> Tensor:
        """Return each group's block of rows, shape (groups, out / groups, r)."""
        return u_out.reshape(self.groups, -1, u_out.shape[1])

    def _blockwise(self, blocks: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply to each group's channels a matrix of its own, shape (groups, m, c)."""
        flat = blocks.flatten(0, 1)
        kernel = flat.reshape(*flat.shape, *(1,) * self._order)
        return CONV[self._order](x, kernel, bias, groups=self.groups)


def _each(value: int | Sequence[int], order: int) -> tuple[int, ...]:
    """Spread one number over all spatial dimensions."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * order if len(values) == 1 else values


def _laid_out(kernel: Tensor, h: Tensor) -> Tensor:
    """Lay out a kernel as activations are: a gradient that is given no input follows its kernel."""
    last = _CHANNELS_LAST.get(h.dim())
    if last is None or h.is_contiguous() or not h.is_contiguous(memory_format=last):
        return kernel
    return torch.empty_like(kernel, memory_format=last).copy_(kernel)  # also where sides are one


def _pointwise(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a matrix of shape (m, c) to the c channels at every position."""
    spatial = x.shape[2:]
    if x.is_contiguous() and math.prod(spatial) >= _MANY_POSITIONS:
        columns = x.flatten(2)
        if bias is None:
            return torch.matmul(matrix, columns).unflatten(2, spatial)
        matrices = matrix.expand(x.shape[0], *matrix.shape)
        return torch.baddbmm(bias[:, None], matrices, columns).unflatten(2, spatial)
    kernel = matrix.reshape(*matrix.shape, *(1,) * len(spatial))
    return CONV[len(spatial)](x, kernel, bias)


def _correlate(x: Tensor, y: Tensor) -> Tensor:
    """Sum ``x y^T`` over batch and positions: shape (channels of x, channels of y)."""
    positions, channels = math.prod(x.shape[2:]), min(x.shape[1], y.shape[1])
    if x.is_contiguous() and y.is_contiguous() and positions >= 2 * channels:
        # One product per image, fewer channels first; their sum is small beside the activations.
        if x.shape[1] > y.shape[1]:
            return _correlate(y, x).mT
        return (x.flatten(2) @ y.flatten(2).mT).sum(0)
    order = x.dim() - 2
    shape = (x.shape[1], y.shape[1], *(1,) * order)
    return KERNEL_GRADIENT[order](y, shape, x).flatten(1)
