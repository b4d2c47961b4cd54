"""Low rank by plain descent: weights as products of factors, all stepped by the optimizer.

The baselines without geometry. Each starts at the dense network's truncation, or, CP, at random,
and in a size that lets the signal through: a truncated weight is scaled up as `factorize` does it
for ours, evenly in all factors (of Tucker in the core), and a random one has the deviation of the
dense weight.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from training import Epoch, Recipe, size, train

import geotucker as gt
from geotucker_torch import TuckerConv2d, TuckerLinear, to_tltorch
from geotucker_torch._layers import rescaled
from geotucker_torch._modules import replaced
from geotucker_torch._tltorch import _imported
from geotucker_torch._train._data import DataSet

SPARED = 0.1  # heuristic: so much of the budget may go to small layers that stay dense


class Product(NamedTuple):
    """What may take a dense layer's place: the entries of its weight, and how it is built."""

    size: int
    build: Callable[[], nn.Module]


# The product for a layer whose ranks are a number, or as large as they can be.
Format: TypeAlias = Callable[[Any, int], Product]


def plain_descent(
    form: Format, model: nn.Module, kept: float, data: DataSet, recipe: Recipe
) -> Iterator[Epoch]:
    """Descend on all factors of a network in some format."""
    model = at_share(model, kept, form)
    return train(model, recipe.sgd(model), data, recipe)


def plain_descent_by_tltorch(
    form: Format, model: nn.Module, kept: float, data: DataSet, recipe: Recipe
) -> Iterator[Epoch]:
    """Descend on all factors of tensorly-torch's layers, with TensorLy's backend as they need it.

    J. Kossaifi et al., TensorLy-Torch, http://tensorly.org/torch. It needs opt-einsum beside it:
    without, PyTorch contracts from left to right, and a linear layer takes the memory of its input
    times its core.
    """
    with _imported():
        yield from plain_descent(form, model, kept, data, recipe)


def at_share(model: nn.Module, kept: float, form: Format) -> nn.Module:
    """Bring the linear layers and convolutions of a network into a format, in place.

    All have the same rank, the largest by which the whole network keeps no more than `kept`; what
    is left then raises single ranks, of the largest layers that it suffices for. (With the same
    share of its entries for each layer small ones would come down to rank one, which nothing gets
    through: LeNet-5 at 3 % hardly learned so.) Layers that would not shrink stay dense, and so do
    convolutions in groups, and the smallest layers, as many as take a tenth of the budget together,
    as long as it can be met so.

    Raises
    ------
    ValueError
        If rank one is too large.
    """
    allowed = int(kept * size(model))
    layers = sorted(filter(_can_be_a_product, model.modules()), key=_entries)
    spared = sum(total <= SPARED * allowed for total in accumulate(map(_entries, layers)))

    def saved(layer: nn.Module, rank: int) -> int:
        return max(0, _entries(layer) - form(layer, rank).size)

    def total(chosen: Sequence[nn.Module], rank: int) -> int:
        return size(model) - sum(saved(layer, rank) for layer in chosen)

    possible = range(1, _entries(layers[-1]) + 1)
    for chosen in (layers[spared:], layers):
        rank = bisect_right(possible, allowed, key=partial(total, chosen))
        if rank > 0:
            break
    else:
        least = total(layers, 1) / size(model)
        raise ValueError(f"kept: expected at least {least:.4g}, which rank one takes, got {kept}")
    ranks, left = dict.fromkeys(reversed(chosen), rank), allowed - total(chosen, rank)

    def step(layer: nn.Module) -> int:
        return saved(layer, ranks[layer]) - saved(layer, ranks[layer] + 1)

    while layer := next((layer for layer in ranks if 0 < step(layer) <= left), None):
        left -= step(layer)
        ranks[layer] += 1
    return with_products(model, {m: form(m, r) for m, r in ranks.items() if saved(m, r)})


def with_products(model: nn.Module, products: Mapping[nn.Module, Product]) -> nn.Module:
    """Put products where layers are, with the same biases, in place."""
    successors: dict[nn.Module, Any] = {layer: new.build() for layer, new in products.items()}
    for layer, new in successors.items():
        (new[-1] if isinstance(new, nn.Sequential) else new).bias = layer.bias
    return replaced(model, successors)


def matrix(layer: Any, rank: int) -> Product:
    """Return U V^T, at first by the singular value decomposition, whose values both factors share.

    A linear layer becomes two of them, and a convolution one with the same kernel to r channels,
    followed by one of 1 x 1 (X. Zhang et al., Accelerating very deep convolutional networks,
    TPAMI 2016, arXiv:1505.06798).
    """
    each = len(layer.weight) + layer.weight[0].numel()
    return Product(rank * each, partial(_two_layers, layer, rank))


def tucker(layer: Any, rank: int) -> Product:
    """Return core and factors, at first the HOSVD.

    Y.-D. Kim et al., Compression of deep convolutional neural networks, ICLR 2016,
    arXiv:1511.06530, but with factors for the modes of the kernel too.
    """
    shape = tuple(layer.weight.shape)
    ranks = gt.Fixed(rank).for_shape(shape)
    entries = math.prod(ranks) + sum(map(mul, shape, ranks))
    return Product(entries, partial(_tucker_layer, layer, ranks))


def cp(layer: Any, rank: int) -> Product:
    """Return a sum of outer products: V. Lebedev et al., ICLR 2015, arXiv:1412.6553.

    At first at random: alternating least squares take minutes for a large layer, and find little
    in weights that are random themselves. Factors are Gaussian, so that entries have the
    deviation of the dense ones.
    """
    each = 1 + sum(layer.weight.shape)
    return Product(rank * each, partial(_cp_layer, layer, rank))


def tt(layer: Any, rank: int) -> Product:
    """Return a tensor train, at first by the TT-SVD.

    A linear layer's matrix is reshaped to up to three modes, each of inputs and outputs
    (A. Novikov et al., Tensorizing neural networks, NIPS 2015, arXiv:1509.06569), and a
    convolution's weight is taken in the order in, height, width, out.
    """
    shape = _train_shape(layer)
    sides = [accumulate(shape, mul), accumulate(reversed(shape), mul)]
    left, right = (list(side)[:-1] for side in sides)
    inner = [min(rank, *bounds) for bounds in zip(left, reversed(right), strict=True)]
    ranks = (1, *inner, 1)
    entries = sum(a * n * b for a, n, b in zip(ranks, shape, ranks[1:], strict=False))
    return Product(entries, partial(_tt_layer, layer, ranks))


def _can_be_a_product(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def _entries(layer: Any) -> int:
    return layer.weight.numel()


@torch.no_grad()
def _gain(truncated: Tensor, weight: Tensor) -> float:
    """Return by how much `factorize` would scale a truncated weight up."""
    scaled = rescaled(gt.TuckerPoint(truncated, ()), weight).core
    return float(scaled.norm() / truncated.norm())


@torch.no_grad()
def _two_layers(layer: Any, rank: int) -> nn.Module:
    weight = layer.weight.flatten(1)
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    roots = values[:rank].sqrt()
    left, right = u[:, :rank] * roots, roots[:, None] * v[:rank]
    gain = _gain(left @ right, weight) ** 0.5
    options = {"bias": False, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, **options)
        second = nn.Linear(rank, layer.out_features, **options)
    else:
        where = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
        first = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **where, **options)
        second = nn.Conv2d(rank, layer.out_channels, 1, **options)
    first.weight.copy_(gain * right.reshape(first.weight.shape))
    second.weight.copy_(gain * left.reshape(second.weight.shape))
    return nn.Sequential(first, second)


def _tucker_layer(layer: Any, ranks: tuple[int, ...]) -> nn.Module:
    kind = TuckerLinear if isinstance(layer, nn.Linear) else TuckerConv2d
    return to_tltorch(kind.from_dense(layer, ranks, rescale=None))


def _cp_layer(layer: Any, rank: int) -> nn.Module:
    new = _tltorch_layer(layer, "cp", rank)
    new.weight.normal_(0, float(layer.weight.detach().std()))
    return new


@torch.no_grad()
def _tt_layer(layer: Any, ranks: tuple[int, ...]) -> nn.Module:
    if isinstance(layer, nn.Linear):
        new = _tltorch_layer(layer, "blocktt", ranks)
        new.weight.init_from_matrix(layer.weight)
        start = new.weight.to_matrix()
    else:
        new = _tltorch_layer(layer, "tt", ranks)
        new.weight.init_from_tensor(layer.weight.movedim(0, -1).contiguous())
        start = new.weight.to_tensor().movedim(-1, 0)
    gain = _gain(start, layer.weight) ** (1 / len(new.weight.factors))
    for factor in new.weight.parameters():
        factor.mul_(gain)
    return new


def _tltorch_layer(layer: Any, factorization: str, rank: Any) -> Any:
    """Return a layer of tensorly-torch, without bias, whose weight is still to be set.

    By its class, as ``from_conv`` takes the first stride for all.
    """
    import tltorch  # switches TensorLy's backend, so not at the top

    options: dict[str, Any] = {"factorization": factorization, "rank": rank, "bias": False}
    options |= {"implementation": "factorized", "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Conv2d):
        options |= {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
        sizes = layer.in_channels, layer.out_channels, layer.kernel_size
        return tltorch.FactorizedConv(*sizes, **options)
    reshaped = factorization == "blocktt"
    inputs, outputs = _sides(layer) if reshaped else ((layer.in_features,), (layer.out_features,))
    return tltorch.FactorizedLinear(inputs, outputs, **options)


def _sides(layer: nn.Linear) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what inputs and outputs are reshaped to, into equally many modes."""
    from tltorch.utils import get_tensorized_shape

    sides = get_tensorized_shape(layer.in_features, layer.out_features, order=3, verbose=False)
    return tuple(sides[0]), tuple(sides[1])


def _train_shape(layer: Any) -> tuple[int, ...]:
    """Return the sizes of the modes of a tensor train."""
    if isinstance(layer, nn.Linear):
        return tuple(map(mul, *_sides(layer)))
    out, *others = layer.weight.shape
    return (*others, out)
