"""Attention whose projections are layers, and so can be Tucker layers.

``nn.MultiheadAttention`` keeps the weights of its three input projections as one parameter, and
reads them and that of its output projection past any layer. `TuckerMultiheadAttention` computes the
same from four layers: what trains Tucker layers in one pass sees inputs and gradients of each.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geotucker as gt

from ._modules import has_hooks
from ._point import own_parameter

__all__ = [
    "PROJECTIONS",
    "TuckerMultiheadAttention",
    "join_state",
    "split_attention",
    "split_state",
]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_INPUTS = PROJECTIONS[:3]


class TuckerMultiheadAttention(nn.Module):
    """``nn.MultiheadAttention`` with a layer for each of its four projections.

    `factorize` puts it where at least one projection becomes a `TuckerLinear`; the others are
    ``nn.Linear``. Call it as the original. It has no fast path for inference, and no ``bias_k``,
    ``bias_v`` and ``add_zero_attn``; an ``nn.TransformerEncoder`` around it no longer turns padded
    inputs into nested tensors (``use_nested_tensor``).

    Parameters
    ----------
    q_proj, k_proj, v_proj, out_proj : nn.Module
        Layers on the last dimension: of query, key and value to one size, and from that to the
        output.
    num_heads : int
        Divides that size.
    dropout : float
        Of the attention weights, in training.
    batch_first : bool
        Whether batched inputs and outputs are of shape (batch, positions, features) instead of
        (positions, batch, features).

    Examples
    --------
    >>> from geotucker_torch import factorize
    >>> attention = factorize(nn.MultiheadAttention(32, 4), ranks=8, verbose=False)
    >>> type(attention).__name__, attention.q_proj.ranks
    ('TuckerMultiheadAttention', (8, 8))
    >>> x = torch.ones(5, 2, 32)
    >>> attention(x, x, x)[0].shape
    torch.Size([5, 2, 32])
    """

    # What encoders of PyTorch ask for before they take a fast path that reads weights.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        out_proj: nn.Module,
        num_heads: int,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj
        self.num_heads, self.dropout, self.batch_first = num_heads, dropout, batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if they are wanted, the attention weights.

        Arguments, shapes and masks are those of ``nn.MultiheadAttention``; `is_causal` is a hint
        that comes with an `attn_mask`.

        Raises
        ------
        geotucker.ShapeError
            If `query` has neither two nor three dimensions.
        ValueError
            If `is_causal` comes without an `attn_mask`.
        """
        if query.dim() not in (2, 3):
            raise gt.ShapeError(
                "query: expected shape (positions, features), or three dimensions with the batch, "
                f"got {tuple(query.shape)}"
            )
        if is_causal and attn_mask is None:
            raise ValueError("is_causal: expected an attn_mask with it, got None")
        q = self._heads(self.q_proj(query))
        k = self._heads(self.k_proj(key))
        v = self._heads(self.v_proj(value))
        mask = _joined(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = y.transpose(1, 2).flatten(2)  # shape: (batch, positions, features)
        if query.dim() == 2:
            y, weights = y[0], None if weights is None else weights[0]
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return self.out_proj(y), weights

    def _heads(self, x: Tensor) -> Tensor:
        """Return projected features in the shape (batch, heads, positions, features of a head)."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @torch.no_grad()
    def to_dense(self) -> nn.MultiheadAttention:
        """Return PyTorch's module with the same weights; it shares nothing with this one."""
        layers: list[Any] = [getattr(self, name) for name in PROJECTIONS]
        weights = [layer.weight for layer in layers]
        *inputs, out = layers
        size, sizes = weights[0].shape[0], [weight.shape[1] for weight in weights[:3]]
        dense: Any = nn.MultiheadAttention(
            size,
            self.num_heads,
            self.dropout,
            bias=out.bias is not None,
            kdim=sizes[1],
            vdim=sizes[2],
            batch_first=self.batch_first,
            device="meta",
        )
        trained = any(p.requires_grad for layer in inputs for p in layer.parameters())
        if dense.in_proj_weight is not None:
            dense.in_proj_weight = own_parameter(torch.cat(weights[:3]), trained)
        else:
            for name, weight in zip(_INPUTS, weights, strict=False):
                setattr(dense, f"{name}_weight", own_parameter(weight, trained))
        dense.out_proj.weight = own_parameter(
            weights[3], any(p.requires_grad for p in out.parameters())
        )
        if out.bias is not None:
            biases = torch.cat([layer.bias for layer in inputs])
            dense.in_proj_bias = own_parameter(biases, trained)
            dense.out_proj.bias = own_parameter(out.bias, out.bias.requires_grad)
        return cast("nn.MultiheadAttention", dense.train(self.training))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the state of ``nn.MultiheadAttention`` too."""
        split_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def split_attention(module: nn.Module) -> TuckerMultiheadAttention | None:
    """Return an attention with four linear layers, or None if the module cannot be split so.

    The parameters are the module's where those are not joint.
    """
    if type(module) is not nn.MultiheadAttention or has_hooks(module):
        return None
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    state = dict(module.named_parameters())
    known = {"in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in _INPUTS)}
    if not own <= known or module.add_zero_attn or has_hooks(module.out_proj):
        return None
    if module._buffers or len(state) != len(own) + len(list(module.out_proj.parameters())):
        return None  # computed from others, or tied within
    with torch.enable_grad():  # parts ask for gradients if the whole does
        split_state(state, "")
    layers: dict[str, nn.Module] = {}
    for name in PROJECTIONS:
        weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
        layer: Any = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = _of_its_own(weight)
        if bias is not None:
            layer.bias = _of_its_own(bias)
        layers[name] = layer.train(module.training)
    new = TuckerMultiheadAttention(
        **layers,
        num_heads=module.num_heads,
        dropout=module.dropout,
        batch_first=module.batch_first,
    )
    return new.train(module.training)


def split_state(state: dict[str, Any], prefix: str) -> None:
    """Turn the entries of ``nn.MultiheadAttention`` into those of four layers, in place."""
    for kind in ("weight", "bias"):
        joint = state.pop(f"{prefix}in_proj_{kind}", None)
        parts = joint.chunk(3) if joint is not None else [None] * 3
        for name, part in zip(_INPUTS, parts, strict=True):
            part = state.pop(f"{prefix}{name}_{kind}", part)
            if part is not None:
                state[f"{prefix}{name}.{kind}"] = part


def join_state(state: dict[str, Any], prefix: str, joint: bool) -> None:
    """Turn the entries of four dense layers into those of ``nn.MultiheadAttention``, in place."""
    for kind in ("weight", "bias"):
        keys = [f"{prefix}{name}.{kind}" for name in _INPUTS]
        if not all(key in state for key in keys):
            continue
        parts = [state.pop(key) for key in keys]
        if joint or kind == "bias":
            state[f"{prefix}in_proj_{kind}"] = torch.cat(parts)
        else:
            for name, part in zip(_INPUTS, parts, strict=True):
                state[f"{prefix}{name}_weight"] = part


def _of_its_own(tensor: Tensor) -> nn.Parameter:
    """Return a parameter as it is, and of a part of one a copy."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return own_parameter(tensor, tensor.requires_grad)


def _joined(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Return one mask to be added to scores of shape (batch, heads, positions, positions)."""
    batch, heads = q.shape[:2]
    parts = []
    if mask is not None:
        mask = _additive(mask, q.dtype)
        parts.append(mask if mask.dim() == 2 else mask.unflatten(0, (batch, heads)))
    if padding is not None:
        padding = _additive(padding, q.dtype)
        parts.append(padding.reshape(batch, 1, 1, -1))
    return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added: what a boolean one excludes gets minus infinity."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
