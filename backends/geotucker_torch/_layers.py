"""Tucker layers: ``nn.Linear`` and ``nn.ConvNd`` whose weight is kept as core and factors."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

import geotucker as gt
from geotucker._tensor import pad

from ._contract import contract, dense_weight, without_autocast
from ._lift import lifting
from ._lifted import Extension, Lift, Right, Waiting
from ._maps import ConvMap, LayerMap, LinearMap
from ._plan import Sizes
from ._point import own_parameter, read_point, write_point
from ._tensor_plan import TensorSizes

if TYPE_CHECKING:
    from ._peers import Peers

__all__ = [
    "TuckerConv1d",
    "TuckerConv2d",
    "TuckerConv3d",
    "TuckerLinear",
    "TuckerModule",
    "check_convolution",
    "check_count",
    "check_sizes",
    "convolution_repr",
    "decompose",
    "rescaled",
    "tucker_state",
]

_Layer = TypeVar("_Layer", bound="TuckerModule")
_ORDER: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
# What the axes of a kernel are called, by their number.
_KERNEL = ((), ("width",), ("height", "width"), ("depth", "height", "width"))
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


# Calls outside of compiled graphs, which are then valid at all ranks.
_called_eagerly: Any = torch.compiler.disable(lambda run, *arguments: run(*arguments))


def _is_transformed() -> bool:
    """Tell whether a transform of torch.func is active, or a tracer: they want no lift."""
    active: bool = getattr(torch._C, "_are_functorch_transforms_active", bool)()
    return active or torch._C._is_tracing()


def _is_aside() -> bool:
    """Tell whether this is a part of a backward pass, or runs in inference mode."""
    return torch.is_inference_mode_enabled() or torch._C._current_graph_task_id() != -1


def _of_lift(name: str) -> Any:
    """Return an attribute that tied layers share."""
    return property(
        lambda layer: getattr(layer._lift, name),
        lambda layer, value: setattr(layer._lift, name, value),
    )


class TuckerModule(nn.Module):
    """Base of all layers whose weight is ``W = core x_1 U_1 ... x_d U_d``.

    Axes are those of the dense layer's weight, for instance ``(out, in)``, or ``(out, in / groups,
    k_1, ...)``. The factors have orthonormal columns. They are parameters, and so are saved, moved
    and counted, but they ask for no gradient: bases are moved by an optimizer that knows the
    geometry, never descended on. Shapes and ranks are read off the parameters, so that they
    are right after every change of rank.

    Attributes
    ----------
    core : nn.Parameter, shape (r_1, ..., r_d)
        Trained as any weight.
    factors : nn.ParameterList of shapes (n_i, r_i)
        Orthonormal bases of the modes, with ``requires_grad=False``.
    bias : nn.Parameter, or None
        As in the dense layer.
    """

    dense_type: ClassVar[type[Any]]
    # Arguments of the constructor that the dense layer shares, also the names of attributes.
    _options: ClassVar[tuple[str, ...]]
    _takes_bias: ClassVar[bool] = True
    # What the first two axes of the weight are.
    _axes: ClassVar[tuple[str, str]] = ("out", "in")
    # Of the entries of a dense layer's weight at the start; None: 1 / (3 fan_in).
    _start_variance: ClassVar[float | None] = None

    core: nn.Parameter
    factors: nn.ParameterList
    bias: nn.Parameter | None

    # Shared by layers that are tied; what its attributes are is said there.
    _lift: Lift
    armed: bool = _of_lift("armed")
    extension: Extension = _of_lift("extension")
    loss_scale: Tensor | float = _of_lift("loss_scale")
    narrow: gt.TuckerPoint | None = _of_lift("narrow")
    right: Right | None = _of_lift("right")
    lifted_norm: Tensor | None = _of_lift("lifted_norm")
    pending: Any = _of_lift("pending")
    uses: int = _of_lift("uses")
    waiting: Waiting = _of_lift("waiting")
    peers: "Peers | None" = _of_lift("peers")
    # Of the last pass that could extend the bases.
    sizes: Sizes | TensorSizes | None

    def __init__(
        self,
        shape: Sequence[int],
        ranks: Any,
        bias_size: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        sizes = _ranks_for(ranks, shape)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a real floating dtype, got {dtype}")
        super().__init__()
        self._lift, self.sizes = Lift(), None
        like = {"device": device, "dtype": dtype}
        self.core = nn.Parameter(torch.empty(sizes, **like))
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty((n, r), **like), requires_grad=False)
            for n, r in zip(shape, sizes, strict=True)
        )
        self.register_parameter(
            "bias", None if bias_size is None else nn.Parameter(torch.empty(bias_size, **like))
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw orthonormal factors and a core that give W the dense layer's variance.

        The factors are Q of the QR decomposition of Gaussian matrices, so that the mean of
        ``U_i[n, r]^2`` is ``1 / n_i``. With independent core entries of variance s^2 an entry
        of W has variance ``s^2 prod r_i / n_i``. PyTorch's dense layers start with variance
        ``1 / (3 fan_in)``, where fan_in is the number of weights in one slice along the first
        axis, hence ``s^2 = prod (n_i / r_i) / (3 fan_in)``. The bias is uniform in
        ``(-1 / sqrt(fan_in), 1 / sqrt(fan_in))``, as PyTorch's.
        """
        if self.core.is_meta:
            return
        shape = self.shape
        fan_in = math.prod(self.weight_shape[1:])
        for factor in self.factors:
            wide = torch.promote_types(factor.dtype, torch.float32)  # half has no QR
            gaussian = torch.randn(factor.shape, dtype=wide, device=factor.device)
            factor.copy_(torch.linalg.qr(gaussian)[0])
        dense = self._start_variance or 1 / (3 * fan_in)
        variance = dense * math.prod(shape) / math.prod(self.ranks)
        self.core.normal_(0.0, math.sqrt(variance))
        if self.bias is not None:
            self.bias.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    @classmethod
    def from_dense(
        cls: type[_Layer], layer: nn.Module, ranks: Any = 0.25, *, rescale: bool | None = None
    ) -> _Layer:
        """Build a Tucker layer from a dense one, by the HOSVD of its weight.

        Parameters
        ----------
        layer : nn.Module
            A layer of type `dense_type`. It is not changed and shares nothing with the result.
        ranks : rank rule, int, float or tuple
            See `geotucker.Fixed` and `geotucker.Tolerance`.
        rescale : bool, optional
            Whether the truncated weight is scaled up towards the norm of the dense one instead
            of being the nearest to it. By default it is if the weight looks untrained, that is
            as independent random numbers do: else signals fade from layer to layer. State
            it where training may have been too short to tell.

        Returns
        -------
        TuckerModule
            With the layer's options, device, dtype, bias, ``requires_grad`` and mode (training
            or not). A layer on the meta device gives one on the meta device, if the rule
            needs no singular values.

        Raises
        ------
        TypeError
            If `layer` is not of type `dense_type`, or lazy and without a shape so far.
        ValueError
            If the weight is computed from other parameters (weight norm, pruning ...), or the layer
        has options that the Tucker layer lacks.
        geotucker.NonFiniteError
            If the weight has NaN or infinite entries.
        geotucker.RankError
            If `ranks` cannot be used.

        Examples
        --------
        >>> layer = TuckerLinear.from_dense(nn.Linear(6, 4), ranks=2)
        >>> layer.ranks, layer.shape
        ((2, 2), (4, 6))
        """
        weight = cls._weight_of(layer)
        if weight.is_meta:
            sizes = _ranks_for(ranks, tuple(weight.shape))
            core = weight.new_empty(sizes)
            factors = (weight.new_empty(n, r) for n, r in zip(weight.shape, sizes, strict=True))
            return cls._from_point(layer, gt.TuckerPoint(core, tuple(factors)))
        return cls._from_point(layer, decompose(weight, ranks), rescale)

    @classmethod
    def _from_point(
        cls: type[_Layer],
        layer: nn.Module,
        point: gt.TuckerPoint,
        rescale: bool | None = False,
        **arguments: Any,
    ) -> _Layer:
        """Build the layer with the options of a dense layer, or others, and a point's weight."""
        weight = cls._weight_of(layer)
        point = rescaled(point, weight, rescale)
        arguments = arguments or {name: getattr(layer, name) for name in cls._options}
        bias = layer._parameters.get("bias")
        if cls._takes_bias:
            arguments["bias"] = bias is not None
        # On the meta device nothing is drawn: the state of the random generators stays.
        new = cls(**arguments, ranks=1, device="meta")
        new.core = own_parameter(point.core.to(weight.dtype), weight.requires_grad)
        new.factors = nn.ParameterList(
            own_parameter(factor.to(weight.dtype), False) for factor in point.factors
        )
        if bias is not None:
            new.bias = own_parameter(bias, bias.requires_grad)
        return new.train(layer.training)

    @classmethod
    def check_dense(cls, layer: nn.Module) -> None:
        """Raise ValueError if a layer of type `dense_type` has options that this one lacks."""

    @classmethod
    def _weight_of(cls, layer: nn.Module) -> nn.Parameter:
        if not isinstance(layer, cls.dense_type):
            raise TypeError(
                f"layer: expected {_title(cls.dense_type)} for {cls.__name__}.from_dense, "
                f"got {_title(type(layer))}"
            )
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ValueError(
                f"layer: expected the weight of {_title(type(layer))} to be a parameter, got one "
                "that is computed from others (weight or spectral norm, parametrization, "
                "pruning); make that permanent first, for instance with "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        cls.check_dense(layer)
        if nn.parameter.is_lazy(weight):
            raise TypeError(
                f"layer: expected a layer with a shape, got {_title(type(layer))} before its "
                "first forward pass; run the model once on an example"
            )
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Apply the dense layer's map, by contraction of core and factors."""
        return self._apply_map(self.map, x)

    def _apply_map(self, layer_map: LayerMap, x: Tensor) -> Tensor:
        return self._uncompiled(self._contracted, layer_map, x)

    def _contracted(self, layer_map: LayerMap, x: Tensor) -> Tensor:
        if self._lifts:
            return lifting(self, layer_map, x)
        return contract(layer_map, x, self.core, self._bases, self.bias)

    def _uncompiled(self, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """Call a function, outside of compiled graphs where an optimizer moves the bases."""
        if torch.compiler.is_compiling() and torch.is_grad_enabled() and self._is_moved:
            output: Tensor = _called_eagerly(self._run_here, run, *arguments)
            return output
        return self._run_here(run, *arguments)

    def _run_here(self, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if not torch.compiler.is_compiling() and self.is_dropped and not _is_aside():
            self.unlift()
        if self.peers is not None and torch.is_grad_enabled():
            self.peers.enter()
        return run(*arguments)

    @property
    def is_dropped(self) -> bool:
        """Whether a lift has lost its gradient, whoever dropped that."""
        return self.is_lifted and self._is_own and self.core.grad is None

    @property
    def _bases(self) -> list[Tensor]:
        """The factors as a pass that lifts nothing sees them."""
        alone = self.extension.alone and self._is_own
        return [factor.detach() if alone else factor for factor in self.factors]

    @property
    def _is_own(self) -> bool:
        """Whether the core is that which an optimizer trains, not one of a functional call."""
        return self.core is self._lift.trained

    @property
    def _is_moved(self) -> bool:
        """Whether an optimizer moves the bases."""
        return self._lift.trained is not None

    @property
    def _lifts(self) -> bool:
        """Whether the backward of a pass that is made now brings its gradient by `_lift`."""
        if not (self.armed or self.is_lifted) or not torch.is_grad_enabled():
            return False
        return self._is_own and self.core.requires_grad and not _is_transformed()

    @property
    def is_lifted(self) -> bool:
        """Whether the lift is as the optimizer that asked for it has left it.

        Else the wider point is the layer's: who has written into a lifted core, has replaced it or
        converted it, wants to see that used. So does who has a copy, or has lost the optimizer.
        """
        if self.narrow is None or not self._is_moved or self.core.is_inference():
            return False
        core = self.narrow.core
        alike = (core.dtype, core.device) == (self.core.dtype, self.core.device)
        return alike and self.core._version == self._lift.version

    @property
    def map(self) -> LayerMap:
        """The linear maps that the layer is a chain of."""
        raise NotImplementedError

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return the dense layer with the same options, weight, bias, device, dtype and mode.

        Returns
        -------
        nn.Module
            Of type `dense_type`. It shares nothing with this layer.

        Examples
        --------
        >>> TuckerConv1d(2, 4, kernel_size=3, padding=1).to_dense()
        Conv1d(2, 4, kernel_size=(3,), stride=(1,), padding=(1,))
        """
        arguments = {name: getattr(self, name) for name in self._options}
        if self._takes_bias:
            arguments["bias"] = self.bias is not None
        dense = self.dense_type(**arguments, device="meta")
        dense.weight = own_parameter(self.dense_weight(), self.core.requires_grad)
        if self.bias is not None:
            dense.bias = own_parameter(self.bias, self.bias.requires_grad)
        return dense.train(self.training)

    def tie(self, other: "TuckerModule") -> None:
        """Use the core and factors of another layer, the same objects, from now on.

        Both train them then: gradients of both uses add up in the core, and extend the bases
        together. Build optimizers afterwards. `factorize` ties layers whose dense weight is one.

        Parameters
        ----------
        other : TuckerModule
            Of any kind, with a weight of the same shape.

        Raises
        ------
        TypeError
            If `other` is no Tucker layer.
        geotucker.ShapeError
            If its weight has another shape.

        Examples
        --------
        >>> encoder, decoder = TuckerLinear(6, 4, ranks=2), TuckerLinear(6, 4, ranks=3)
        >>> decoder.tie(encoder)
        >>> decoder.core is encoder.core, decoder.ranks
        (True, (2, 2))
        """
        if not isinstance(other, TuckerModule):
            raise TypeError(f"other: expected a Tucker layer, got {type(other).__name__}")
        if other.shape != self.shape:
            raise gt.ShapeError(
                f"other: expected a layer with a weight of shape {self.shape}, got {other.shape}"
            )
        self.core, self.factors, self._lift = other.core, other.factors, other._lift

    def dense_weight(self) -> Tensor:
        """Return W in full, differentiable in core and factors, formed in float32 at least."""
        return dense_weight(self.core, list(self.factors)).reshape(self.weight_shape)

    @property
    def weight(self) -> Tensor:
        """W in full, for code that reads a layer's weight, such as the fast path of encoders.

        It is formed anew at each call: writing into it does not change the layer.
        """
        return self.dense_weight()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (n_1, ..., n_d) of the weight as a tensor."""
        return tuple(factor.shape[0] for factor in self.factors)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight."""
        return self.shape

    @property
    def mode_names(self) -> tuple[str, ...]:
        """What the modes are called: "out", "in", "height", ..."""
        return (*self._axes, *_KERNEL[len(self.shape) - 2])

    @property
    def ranks(self) -> tuple[int, ...]:
        """Shape (r_1, ..., r_d) of the core."""
        return tuple(self.core.shape)

    @property
    def settled_ranks(self) -> tuple[int, ...]:
        """The ranks without a lift that no step has used."""
        return self.ranks if self.narrow is None else self.narrow.ranks

    @property
    def point(self) -> gt.TuckerPoint:
        """Core and factors outside any graph; they share their memory with the parameters."""
        return read_point(self.core, self.factors)

    @property
    def settled_point(self) -> gt.TuckerPoint:
        """The point without a lift that no step has used; the weight is the same."""
        return self.narrow if self.narrow is not None and self.is_lifted else self.point

    @torch.no_grad()
    def lift(self, wide: gt.TuckerPoint, right: Right) -> None:
        """Take the wider bases of the same weight that ``augment`` has returned.

        A gradient that the core has already is padded with zeros. `right`, the Q_i of the core, is
        kept for those who write tangent vectors in the wide bases.
        """
        narrow, grad = self.point, self.core.grad
        write_point(self.core, self.factors, wide)
        if grad is not None:
            self.core.grad = pad(grad, wide.ranks)
        self.narrow, self.right, self.armed = narrow, right, False
        self._lift.version, self.uses = self.core._version, 0

    def lift_state(self) -> tuple[Any, ...]:
        """Return what `restore_lift` needs, parameters aside."""
        record = self.armed, self.narrow, self.right, self.lifted_norm, self.loss_scale
        return (*record, self.is_lifted)

    def restore_lift(self, state: tuple[Any, ...]) -> None:
        """Go back to a state of `lift_state`; the parameters are those of that moment again."""
        *record, is_lifted = state
        self.armed, self.narrow, self.right, self.lifted_norm, self.loss_scale = record
        self._lift.version = self.core._version if is_lifted else -1

    def settle(self) -> None:
        """Make a lift final; the core's gradient is the one that the step is taken with."""
        if self.narrow is not None and self.core.grad is not None and self.lifted_norm is not None:
            norm = self.core.grad.abs().amax()
            self.loss_scale = torch.where(norm > 0, self.lifted_norm / norm, 1.0)
        self.narrow = self.right = self.lifted_norm = None
        self._lift.forget_uses()

    def unlift(self) -> None:
        """Take a lift back that no step has used, and its gradient; the weight is unchanged."""
        self._lift.forget_uses()
        if self.narrow is not None:
            write_point(self.core, self.factors, self.settled_point)
            self.narrow, self.right, self.armed = None, None, self._is_moved

    def extra_repr(self) -> str:
        """Return the options, as the dense layer would, and the ranks."""
        size, dense = self.point.size, math.prod(self.shape)
        shown = [self._options_repr()]
        if self._takes_bias:
            shown.append(f"bias={self.bias is not None}")
        shown += [f"ranks={self.ranks}", f"weight parameters {size:,} of {dense:,}"]
        return ", ".join(shown)

    def _options_repr(self) -> str:
        raise NotImplementedError

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state as ever, of the point before a lift that no step has used.

        The weight is the same, and so are its gradients, which are not saved, when they are
        computed again; the optimizer's state fits that point, as it has not seen the lift either.
        """
        state = super().state_dict(*args, **kwargs)
        if self.narrow is not None and not kwargs.get("keep_vars"):
            state.update(tucker_state(self.settled_point, kwargs.get("prefix", "")))
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over the ranks of the state, or, if its shapes do not fit, nothing at all.

        A dense weight is decomposed at the layer's ranks, as `from_dense` does it.
        """
        own = {prefix + name: parameter for name, parameter in self.named_parameters()}
        if self.finds_dense(state_dict, prefix):
            weight = state_dict.pop(prefix + "weight")
            try:
                point = self._decomposed(prefix + "weight", weight)
            except ValueError as error:
                error_msgs.append(str(error))
                state_dict.update(own)
            else:
                assign = local_metadata.get("assign_to_params_buffers", False)
                state_dict.update(tucker_state(point, prefix, weight.dtype if assign else None))
        given = {key: state_dict[key] for key in own if torch.is_tensor(state_dict.get(key))}
        expected = self._expected_shapes(prefix, given)
        wrong = [key for key in given if given[key].shape != expected.get(key, own[key].shape)]
        if wrong:
            # PyTorch would copy the parameters that fit. Its own message, and a state replaced
            # by what is there already, leave the layer as it was.
            error_msgs.extend(
                _size_mismatch(key, given[key].shape, own[key].shape) for key in wrong
            )
            state_dict.update({key: own[key] for key in given})
        else:
            if prefix + "core" in given and self.narrow is not None:
                # The point from before a lift must not come back over the one that is loaded.
                self.narrow, self.right, self.armed = None, None, self._is_moved
            for key, tensor in given.items():
                _resize(own[key], tensor.shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _expected_shapes(self, prefix: str, given: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Shapes to be accepted: other ranks only if core and all factors come along."""
        shape, ranks, keys = self.shape, self.ranks, self._tucker_keys(prefix)
        if all(key in given for key in keys):
            loaded = tuple(given[keys[0]].shape)
            bounds = zip(loaded, shape, strict=False)
            if len(loaded) == len(shape) and all(1 <= r <= n for r, n in bounds):
                ranks = loaded
        return dict(zip(keys, [ranks, *zip(shape, ranks, strict=True)], strict=True))

    def _tucker_keys(self, prefix: str) -> list[str]:
        return [prefix + "core", *(f"{prefix}factors.{mode}" for mode in range(len(self.shape)))]

    def finds_dense(self, state_dict: Mapping[str, Any], prefix: str) -> bool:
        """Tell whether a state has a dense weight for this layer instead of core and factors."""
        found = torch.is_tensor(state_dict.get(prefix + "weight"))
        return found and not any(key in state_dict for key in self._tucker_keys(prefix))

    def _decomposed(self, key: str, weight: Tensor) -> gt.TuckerPoint:
        """Decompose a dense weight at the layer's ranks; ValueError if that cannot be done."""
        if tuple(weight.shape) != self.weight_shape:
            raise ValueError(_size_mismatch(key, weight.shape, torch.Size(self.weight_shape)))
        try:
            point = decompose(weight.reshape(self.shape), self.settled_ranks)
            return rescaled(point, weight)
        except gt.GeotuckerError as error:
            raise ValueError(f"While decomposing {key}: {error}") from error


class TuckerLinear(TuckerModule):
    """``nn.Linear`` with the weight ``W = U_out C U_in^T`` in Tucker format.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last dimension of input and output.
    ranks : rank rule, int, float or tuple of int
        Ranks (r_out, r_in), see `geotucker.Fixed`; they are equal after clamping to what a
        matrix can have. From scratch the rule cannot depend on singular values.
    bias : bool
        Whether a bias is learned.
    device, dtype
        Of all parameters.

    Raises
    ------
    geotucker.ShapeError
        If a size is not a positive integer.
    geotucker.RankError
        If `ranks` cannot be used.

    Examples
    --------
    >>> layer = TuckerLinear(100, 50, ranks=8)
    >>> layer(torch.ones(3, 100)).shape, tuple(layer.core.shape)
    (torch.Size([3, 50]), (8, 8))
    """

    dense_type = nn.Linear
    _options = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Any = 0.25,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        size = out_features if bias else None
        super().__init__((out_features, in_features), ranks, size, device, dtype)
        self.in_features = in_features
        self.out_features = out_features

    @property
    def map(self) -> LinearMap:
        """The linear maps that the layer is a chain of."""
        return LinearMap()

    def _options_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _TuckerConv(TuckerModule):
    """What the convolutions share; they differ in `dense_type` only."""

    _options = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        ranks: Any = 0.25,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        order = _ORDER[self.dense_type]
        check_convolution(in_channels, out_channels, groups, order, kernel_size, stride, dilation)
        _check_padding(padding, stride, padding_mode, order)
        # The dense layer on the meta device brings the arguments into PyTorch's normal form.
        dense = self.dense_type(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
        )
        size = out_channels if bias else None
        super().__init__(tuple(dense.weight.shape), ranks, size, device, dtype)
        for name in self._options:
            setattr(self, name, getattr(dense, name))

    @property
    def map(self) -> ConvMap:
        """The linear maps that the layer is a chain of."""
        return ConvMap.of(
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.padding_mode,
        )

    def _options_repr(self) -> str:
        return convolution_repr(self, self._options)


class TuckerConv1d(_TuckerConv):
    """``nn.Conv1d`` with its weight in Tucker format; see `TuckerConv2d`.

    Examples
    --------
    >>> TuckerConv1d(8, 16, kernel_size=5, ranks=4, padding="same")(torch.ones(8, 10)).shape
    torch.Size([16, 10])
    """

    dense_type = nn.Conv1d


class TuckerConv2d(_TuckerConv):
    """``nn.Conv2d`` with the weight ``W = C x_1 U_out x_2 U_in x_3 U_kh x_4 U_kw``.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of input and output, divisible by `groups`.
    kernel_size : int or tuple of int
        One number for all spatial dimensions, or one for each.
    ranks : rank rule, int, float or tuple of int
        Ranks (r_out, r_in, r_kh, r_kw), see `geotucker.Fixed`. From scratch the rule cannot
        depend on singular values. With groups the weight has in_channels / groups in its
        second axis: the groups share U_in.
    stride, padding, dilation, groups, bias, padding_mode
        As for ``nn.Conv2d``.
    device, dtype
        Of all parameters.

    Raises
    ------
    geotucker.ShapeError
        If a size is out of its range, or `groups` does not divide the channels.
    geotucker.RankError
        If `ranks` cannot be used.
    ValueError
        If `padding` or `padding_mode` is an unknown word, or "same" meets a stride.

    Examples
    --------
    >>> layer = TuckerConv2d(20, 50, kernel_size=5, ranks=10)
    >>> layer.ranks, layer(torch.ones(2, 20, 12, 12)).shape
    ((10, 10, 5, 5), torch.Size([2, 50, 8, 8]))
    """

    dense_type = nn.Conv2d


class TuckerConv3d(_TuckerConv):
    """``nn.Conv3d`` with its weight in Tucker format; see `TuckerConv2d`.

    Examples
    --------
    >>> TuckerConv3d(4, 8, kernel_size=3, ranks=2)(torch.ones(1, 4, 5, 5, 5)).shape
    torch.Size([1, 8, 3, 3, 3])
    """

    dense_type = nn.Conv3d


def convolution_repr(layer: Any, options: Sequence[str]) -> str:
    """Return the channels and the other options that are not PyTorch's defaults."""
    plain = {
        "padding": (0,) * len(layer.kernel_size),
        "output_padding": (0,) * len(layer.kernel_size),
        "dilation": (1,) * len(layer.kernel_size),
        "groups": 1,
        "padding_mode": "zeros",
    }
    shown = [str(layer.in_channels), str(layer.out_channels)]
    for name in options[2:]:
        value = getattr(layer, name)
        if value != plain.get(name):
            shown.append(f"{name}={value}")
    return ", ".join(shown)


@torch.no_grad()
def decompose(weight: Tensor, ranks: Any) -> gt.TuckerPoint:
    """Return the HOSVD of a weight, in float32 at least, autocast or not."""
    if weight.is_meta:
        raise gt.RankError(f"ranks: {ranks} needs singular values, got a weight without values")
    with without_autocast(weight):
        wide = torch.promote_types(weight.dtype, torch.float32)
        return gt.hosvd(weight.detach().to(wide), ranks)


@torch.no_grad()
def _is_noise(weight: Tensor) -> bool:
    """Tell whether a weight looks untrained: like independent entries of equal variance.

    Those of an m x n matrix, m <= n, of variance 1 have all singular values between
    ``sqrt(n) - sqrt(m) - t`` and ``sqrt(n) + sqrt(m) + t``, but for a probability of
    ``2 exp(-t^2 / 2)`` if they are normal (Davidson and Szarek 2001, Theorem II.13). All unfoldings
    are to do so. Rows of zeros (of padding) say nothing.
    """
    # Heuristic: of 290,000 fresh weights, normal and uniform, of 2 x 3 to 64 x 64 and up to
    # 16 x 16 x 3 x 3, none went beyond t = 1.7; all layers of two published ResNets go beyond 3.5.
    slack = 2.0
    with without_autocast(weight):
        wide = weight.detach().double()
        wide = wide[wide.flatten(1).any(1)]
        modes = range(wide.ndim if wide.ndim > 2 else 1)  # those of a matrix are transposes
        for mode in modes:
            matrix = wide.movedim(mode, 0).flatten(1)
            m, n = sorted(matrix.shape)
            gram = matrix @ matrix.mT if len(matrix) == m else matrix.mT @ matrix
            values = (torch.linalg.eigvalsh(gram).clamp(min=0) / matrix.square().mean()).sqrt()
            if ((values - math.sqrt(n)).abs() > math.sqrt(m) + slack).any():
                return False
    return True


@torch.no_grad()
def rescaled(point: gt.TuckerPoint, weight: Tensor, rescale: bool | None = None) -> gt.TuckerPoint:
    """Give a truncated weight, by default if it is noise, most of the norm that was cut off.

    The HOSVD of an untrained weight keeps little of it: rank 8 of 120 x 400 about an eighth of
    the energy. Layer upon layer the signal would fade, gradients vanish, and training stay where
    it is. What a truncation drops there has no meaning, but its energy has. With the whole norm,
    though, the few singular values that are left are far larger than the dense layer's largest,
    and learning rates that suit that one are too large.
    """
    if not (_is_noise(weight) if rescale is None else rescale):
        return point
    norms = [torch.linalg.vector_norm(t.double()) for t in (weight.detach(), point.core)]
    # Heuristic: three quarters of the way (in the exponent) trained best over all learning rates.
    scale = torch.nan_to_num(norms[0] / norms[1], nan=1.0) ** 0.75
    return point._replace(core=point.core * scale.to(point.core.dtype))


def tucker_state(
    point: gt.TuckerPoint, prefix: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return a point as entries of a ``state_dict``, in `dtype` or its own."""
    tensors = [tensor.to(dtype or tensor.dtype) for tensor in (point.core, *point.factors)]
    names = ["core", *(f"factors.{mode}" for mode in range(point.order))]
    return {prefix + name: tensor for name, tensor in zip(names, tensors, strict=True)}


@torch.no_grad()
def _resize(parameter: nn.Parameter, shape: torch.Size) -> None:
    """Give the same Parameter object, which optimizers know, other dimensions."""
    if parameter.shape != shape:
        parameter.grad = None
        parameter.set_(parameter.new_empty(shape))  # type: ignore[arg-type]


def _size_mismatch(key: str, given: torch.Size, own: torch.Size) -> str:
    return (
        f"size mismatch for {key}: copying a param with shape {given} from checkpoint, "
        f"the shape in current model is {own}."
    )


def _ranks_for(ranks: Any, shape: Sequence[int]) -> tuple[int, ...]:
    rule = gt.as_rule(ranks)
    if not isinstance(rule, gt.Fixed):
        raise gt.RankError(
            f"ranks: expected an integer, a fraction, a tuple or Fixed for a layer without a "
            f"weight to decompose, got {rule}; from_dense and factorize take every rule"
        )
    return rule.for_shape(shape)


def _title(kind: type) -> str:
    public = getattr(nn, kind.__name__, None) is kind
    return f"nn.{kind.__name__}" if public else kind.__name__


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_count(name: str, value: Any) -> None:
    """Raise ShapeError unless a value is a positive integer."""
    if not _is_integer(value, 1):
        raise gt.ShapeError(f"{name}: expected a positive integer, got {value!r}")


def check_convolution(
    in_channels: Any,
    out_channels: Any,
    groups: Any,
    order: int,
    kernel_size: Any,
    stride: Any,
    dilation: Any,
) -> None:
    """Raise ShapeError if a size is out of its range, or groups do not divide the channels."""
    _check_channels(in_channels, out_channels, groups)
    check_sizes("kernel_size", kernel_size, order, 1, single=False)
    check_sizes("stride", stride, order, 1)
    check_sizes("dilation", dilation, order, 1)


def _check_channels(in_channels: Any, out_channels: Any, groups: Any) -> None:
    sizes = {"in_channels": in_channels, "out_channels": out_channels}
    for name, value in [*sizes.items(), ("groups", groups)]:
        check_count(name, value)
    for name, value in sizes.items():
        if value % groups:
            raise gt.ShapeError(f"groups: expected a divisor of {name} = {value}, got {groups}")


def check_sizes(name: str, value: Any, order: int, least: int, single: bool = True) -> None:
    """Check one number for all spatial dimensions or, in a tuple, one (if `single`) or each."""
    values = value if isinstance(value, (tuple, list)) else (value,) * order
    lengths = (1, order) if single else (order,)
    if len(values) not in lengths or not all(_is_integer(entry, least) for entry in values):
        raise gt.ShapeError(
            f"{name}: expected an integer of at least {least} or {order} of them, got {value!r}"
        )


def _check_padding(padding: Any, stride: Any, padding_mode: Any, order: int) -> None:
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"padding_mode: expected one of {_PADDING_MODES}, got {padding_mode!r}")
    if not isinstance(padding, str):
        # PyTorch pads only the last dimension if a single number in a tuple is not for zeros.
        check_sizes("padding", padding, order, 0, single=padding_mode == "zeros")
    elif padding not in ("same", "valid"):
        raise ValueError(f"padding: expected 'same', 'valid' or integers, got {padding!r}")
    elif padding == "same" and stride not in (1, (1,) * order):
        raise ValueError(f"stride: expected 1 with padding='same', got {stride!r}")
