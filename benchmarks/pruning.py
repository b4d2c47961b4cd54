"""Pruning of single weights: masks of PyTorch, and scores that say which weights stay.

Pruned are weights of linear layers and convolutions, all of them ranked together; biases and what
normalises stay. Counted are the entries that stay, and all other parameters, so that a share is
met exactly. Where the entries stand counts as nothing, which flatters pruning: a file or a kernel
has to know it. A pruned weight has no gradient and never comes back.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from training import Epoch, Recipe, batches, size, train

from geotucker_torch._train._data import DataSet

TEMPERATURE = 200.0  # of GraSP's logits, as in its authors' code
ROUNDS = 100  # of SynFlow, as in its paper
TIMES = 100  # heuristic: how often iterative pruning prunes; in few steps, after each

# What says which weights stay: the network, images, labels, and how many may.
Scores: TypeAlias = Callable[[nn.Module, Tensor, Tensor, int], Sequence[Tensor]]


def prune_at_start(
    scores: Scores, model: nn.Module, kept: float, data: DataSet, recipe: Recipe
) -> Iterator[Epoch]:
    """Prune by scores at one batch of training images, and train what is left."""
    images, labels = next(batches(data, recipe, 0))
    number = allowance(model, kept)
    masks = strongest(scores(deepcopy(model), images, labels, number), number)
    layers = masked(model)
    impose(layers, masks)
    return train(model, recipe.sgd(model), data, recipe, count=count)


def magnitude(model: nn.Module, kept: float, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Prune the smallest weights after half of the steps, and fine-tune the others.

    S. Han et al., Learning both weights and connections, NIPS 2015, arXiv:1506.02626, in one round.
    """
    number, layers = allowance(model, kept), masked(model)

    def after_step(step: int, steps: int) -> None:
        if step == max(1, steps // 2):
            impose(layers, strongest(magnitudes(layers), number))

    return train(model, recipe.sgd(model), data, recipe, after_step=after_step, count=count)


def iterative(model: nn.Module, kept: float, data: DataSet, recipe: Recipe) -> Iterator[Epoch]:
    """Prune the smallest weights bit by bit in the first half of the steps.

    By the cubic schedule of M. Zhu and S. Gupta, To prune, or not to prune, 2017,
    arXiv:1710.01878, equation (1), from the first step on.
    """
    number, layers = allowance(model, kept), masked(model)
    total = sum(layer.weight.numel() for layer in layers)

    def after_step(step: int, steps: int) -> None:
        last = max(1, steps // 2)
        if step <= last and (step % max(1, last // TIMES) == 0 or step == last):
            left = number + round((total - number) * (1 - step / last) ** 3)
            impose(layers, strongest(magnitudes(layers), left))

    return train(model, recipe.sgd(model), data, recipe, after_step=after_step, count=count)


def snip(model: nn.Module, images: Tensor, labels: Tensor, number: int) -> Sequence[Tensor]:
    """Return ``|w dL/dw|``, by how much the loss feels a weight's mask.

    N. Lee et al., SNIP, ICLR 2019, arXiv:1810.02340, Algorithm 1, up to the normalisation, which
    changes no order.
    """
    weights = [layer.weight for layer in prunable(model)]
    loss = F.cross_entropy(model.train()(images), labels)
    gradients = torch.autograd.grad(loss, weights)
    return [(w * g).detach().abs() for w, g in zip(weights, gradients, strict=True)]


def grasp(model: nn.Module, images: Tensor, labels: Tensor, number: int) -> Sequence[Tensor]:
    """Return ``w * (H g)``: where it is largest, the flow of the gradient needs the weight.

    C. Wang et al., Picking winning tickets before training by preserving gradient flow (GraSP),
    ICLR 2020, arXiv:2002.07376, Algorithm 1, with the opposite sign. One batch serves for the
    gradient g of the loss and its Hessian H, both in the weights alone.
    """
    weights = [layer.weight for layer in prunable(model)]
    loss = F.cross_entropy(model.train()(images) / TEMPERATURE, labels)
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    along = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
    products = torch.autograd.grad(along, weights)
    return [(w * p).detach() for w, p in zip(weights, products, strict=True)]


def synflow(model: nn.Module, images: Tensor, labels: Tensor, number: int) -> Sequence[Tensor]:
    """Return the shares of the synaptic flow that weights have in the last of many rounds.

    H. Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic
    flow, NeurIPS 2020, arXiv:2006.05467, Algorithm 1: the flow is the network's output for an input
    of ones with ``|w|`` for each weight w, here in double precision. Biases are zero, and
    normalisation is by statistics as they are at the start. Each round prunes the same share.
    """
    model.eval().double()
    layers = prunable(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        for layer in layers:
            if layer.bias is not None:
                layer.bias.zero_()
    weights = [layer.weight for layer in layers]
    masks: Sequence[Tensor] = [torch.ones_like(w) for w in weights]
    found: Sequence[Tensor] = []
    total = sum(w.numel() for w in weights)
    for step in range(1, ROUNDS + 1):
        flow = model(torch.ones_like(images[:1], dtype=torch.float64)).sum()
        gradients = torch.autograd.grad(flow, weights)
        scores = [w.detach() * g for w, g in zip(weights, gradients, strict=True)]
        found = _among(masks, scores)
        masks = strongest(found, round(total * (number / total) ** (step / ROUNDS)))
        with torch.no_grad():
            for w, mask in zip(weights, masks, strict=True):
                w.mul_(mask)
    return found


def prunable(model: nn.Module) -> list[Any]:
    """Return the layers whose weights may be pruned."""
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def allowance(model: nn.Module, kept: float) -> int:
    """Return how many weights may stay if a share of all parameters may.

    Raises
    ------
    ValueError
        If the other parameters are too many.
    """
    rest = size(model) - sum(layer.weight.numel() for layer in prunable(model))
    number = int(kept * size(model)) - rest
    if number < 1:
        least = (rest + 1) / size(model)
        raise ValueError(f"kept: expected at least {least:.4g}, as biases stay, got {kept}")
    return number


def masked(model: nn.Module) -> list[Any]:
    """Give all prunable weights a mask, of ones, and return their layers."""
    layers = prunable(model)
    for layer in layers:
        prune.identity(layer, "weight")
    return layers


def impose(layers: Sequence[Any], masks: Sequence[Tensor]) -> None:
    """Replace the masks.

    In place: `prune.custom_from_mask` would keep all earlier ones too.
    """
    for layer, mask in zip(layers, masks, strict=True):
        layer.weight_mask.copy_(mask)


def magnitudes(layers: Sequence[Any]) -> Sequence[Tensor]:
    """Return the magnitudes of weights, and less for those that are pruned."""
    masks = [layer.weight_mask for layer in layers]
    return _among(masks, [layer.weight_orig.detach().abs() for layer in layers])


def _among(masks: Sequence[Tensor], scores: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return scores, and less than all others where a mask is zero."""
    pairs = zip(masks, scores, strict=True)
    return [score.masked_fill(mask == 0, -torch.inf) for mask, score in pairs]


def strongest(scores: Sequence[Tensor], number: int) -> Sequence[Tensor]:
    """Return masks that are true at exactly so many of the largest scores of all tensors."""
    flat = torch.cat([score.flatten() for score in scores])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(number, sorted=False).indices] = True
    parts = mask.split([score.numel() for score in scores])
    return [part.reshape(score.shape) for part, score in zip(parts, scores, strict=True)]


def count(model: nn.Module) -> int:
    """Return the number of a network's parameters without those that a mask makes zero."""
    pruned = sum(int((layer.weight_mask == 0).sum()) for layer in prunable(model))
    return size(model) - pruned
