"""The baselines of the benchmarks are what they are called, and keep what they may keep."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tensorly as tl
import torch
from torch import Tensor, nn

import geotucker as gt
from geotucker_torch import plan

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not here")
pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")

BY_TLTORCH = ["Tucker, plain descent", "CP", "TT"]
LOW_RANK = [*BY_TLTORCH, "UV^T, plain descent"]
PRUNING = ["magnitude pruning", "iterative pruning", "SNIP", "GraSP", "SynFlow"]


@pytest.fixture(autouse=True)
def import_as_scripts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find what the scripts share in their own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture(scope="module")
def data() -> Any:
    """Load the digits."""
    from geotucker_torch._train._data import load

    return load("digits", None)


def network() -> nn.Sequential:
    """Return a small network, which has all that methods must leave alone, as it starts."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def recipe(epochs: int = 2) -> Any:
    from training import Recipe

    return Recipe(epochs, rate=0.05, batch=32, momentum=0.9)


def form_of(name: str) -> Callable[[Any, int], Any]:
    """Return the format of a method of low rank."""
    import decompositions

    formats = {"CP": decompositions.cp, "TT": decompositions.tt}
    formats["Tucker, plain descent"] = decompositions.tucker
    formats["UV^T, plain descent"] = decompositions.matrix
    return formats[name]


@pytest.fixture
def run(data: Any) -> Callable[..., list[Any]]:
    """Run a method to its end."""

    def by_name(name: str, kept: float, model: nn.Module | None = None) -> list[Any]:
        from methods import METHODS

        if name in BY_TLTORCH:
            pytest.importorskip("tltorch", reason="tensorly-torch is not installed")
        tl.set_backend("numpy")
        epochs = list(METHODS[name](model or network(), kept, data, recipe()))
        assert tl.get_backend() == "numpy"
        return epochs

    return by_name


@pytest.mark.parametrize("kept", [0.3, 0.1])
@pytest.mark.parametrize("name", LOW_RANK)
def test_methods_of_low_rank_learn_within_their_share(
    run: Callable[..., list[Any]], name: str, kept: float
) -> None:
    total = sum(p.numel() for p in network().parameters())
    first, last = run(name, kept)
    assert last.train_loss < first.train_loss
    assert last.train_loss < (1.5 if kept == 0.3 else 2.29)  # at random: 2.30
    assert {first.parameters, last.parameters} == {first.parameters}
    assert 0.95 * kept * total <= last.parameters <= kept * total


def test_layers_have_the_same_rank_but_small_ones_stay_dense_while_they_can() -> None:
    from decompositions import at_share, matrix

    def ranks(kept: float) -> list[int | None]:
        model = at_share(network(), kept, matrix)
        assert all(len(biases(model[i])) == 1 for i in (0, 3, 6, 8))
        return [len(m[0].weight) if isinstance(m, nn.Sequential) else None for m in layers(model)]

    def layers(model: Any) -> list[Any]:
        return [model[i] for i in (0, 3, 6, 8)]

    def biases(layer: nn.Module) -> list[str]:
        return [name for name, _ in layer.named_parameters() if "bias" in name]

    assert ranks(1.0) == [None] * 4
    assert ranks(0.3) == [None, 14, 14, None]
    assert ranks(0.05) == [None, 2, 2, 1]  # what is left goes to the largest
    assert ranks(0.03) == [3, 1, 1, 2]
    # 20 entries could stay if 190 were enough for the rest.
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(100, 100, bias=False))
    assert isinstance(at_share(model, 0.021, matrix)[0], nn.Sequential)


def test_a_share_that_rank_one_exceeds() -> None:
    from decompositions import at_share, matrix

    model = network()
    with pytest.raises(ValueError, match=r"kept: expected at least 0\.0\d+, .* got 0\.01"):
        at_share(model, 0.01, matrix)
    assert isinstance(model[3], nn.Conv2d)


def truncated(name: str, weight: Tensor, rank: int) -> Tensor:
    """Return the nearest weight, or nearly, of a rank."""
    if name == "UV^T, plain descent":
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        return (u[:, :rank] * s[:rank] @ v[:rank]).reshape(weight.shape)
    if name == "Tucker, plain descent":
        return gt.to_dense(gt.hosvd(weight, (rank, rank, 3, 3)))
    assert name == "TT"
    rest, train = weight.movedim(0, -1), torch.ones(1, 1, dtype=weight.dtype)
    for n in rest.shape[:-1]:
        u, s, v = torch.linalg.svd(rest.reshape(train.shape[-1] * n, -1), full_matrices=False)
        core = u[:, :rank].reshape(train.shape[-1], n, -1)
        train, rest = torch.tensordot(train, core, 1), s[:rank, None] * v[:rank]
    return torch.tensordot(train, rest, 1).squeeze(0).movedim(-1, 0)


def entries(layer: nn.Module) -> int:
    """Return the number of parameters without biases."""
    return sum(p.numel() for name, p in layer.named_parameters() if "bias" not in name)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["Tucker, plain descent", "TT", "UV^T, plain descent"])
def test_low_rank_starts_from_the_truncated_network(name: str, trained: bool, tltorch: Any) -> None:
    conv = network().double().requires_grad_(False)[3]
    if trained:  # something stands out of the noise
        conv.weight += 1
    product = form_of(name)(conv, 7)
    layer = product.build()
    weight = truncated(name, conv.weight, 7)
    gain = 1.0 if trained else float(conv.weight.norm() / weight.norm()) ** 0.75
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    biases = layer.bias if name == "Tucker, plain descent" else None
    expected = torch.conv2d(x, gain * weight, biases, stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected)
    assert entries(layer) == product.size


@pytest.mark.parametrize("name", LOW_RANK)
def test_products_are_as_large_as_dense_layers(name: str, tltorch: Any) -> None:
    linear = nn.Linear(48, 30, bias=False).double()
    product = form_of(name)(linear, 15)
    layer = product.build()
    assert entries(layer) == product.size
    x = torch.randn(500, 48, dtype=torch.float64)
    with torch.no_grad():
        assert 0.4 < float(layer(x).std() / linear(x).std()) < 2


@pytest.mark.parametrize("kept", [0.3, 0.1])
@pytest.mark.parametrize("name", PRUNING)
def test_pruned_networks_learn_in_exactly_their_share(
    run: Callable[..., list[Any]], name: str, kept: float
) -> None:
    model = network()
    weights = {i: model[i].weight.numel() for i in (0, 3, 6, 8)}
    total = sum(p.numel() for p in model.parameters())
    first, last = run(name, kept, model)
    assert last.train_loss < min(first.train_loss, 2.0)
    assert last.parameters == int(kept * total)
    # What stands in the layers is what was counted.
    zeros = sum(int((model[i].weight == 0).sum()) for i in weights)
    assert total - zeros == last.parameters
    assert all(p.all() for p in (model[3].bias, model[6].bias, model[8].bias))


@pytest.mark.parametrize("name", PRUNING)
def test_pruned_weights_never_come_back(
    name: str, data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import training
    from methods import METHODS

    seen: list[Tensor] = []
    descend = training.descend

    def watched(model: Any, *arguments: Any) -> float:
        loss = descend(model, *arguments)
        with torch.no_grad():
            model(arguments[1])
        seen.append(torch.cat([model[i].weight.flatten() == 0 for i in (0, 3, 6, 8)]))
        return loss

    monkeypatch.setattr(training, "descend", watched)
    monkeypatch.setattr(training, "cost", lambda *_: training.Cost())  # by steps of its own
    (last,) = METHODS[name](network(), 0.2, data, recipe(epochs=1))
    assert all(bool((before <= after).all()) for before, after in pairwise(seen))
    counts = [int(zeros.sum()) for zeros in seen]
    assert counts[-1] == len(seen[0]) - (last.parameters - 154)  # biases, and normalisation
    half = len(seen) // 2
    if name in PRUNING[2:]:
        assert counts[0] == counts[-1]
    elif name == "magnitude pruning":  # after that step
        assert counts[half - 1] == 0 and counts[half] == counts[-1]
    else:
        for step in (half // 4, half // 2, half):
            expected = 1 - (1 - step / half) ** 3
            assert counts[step] / counts[-1] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kept", [0.3, 0.1])
def test_riemannian_descent_keeps_its_ranks(run: Callable[..., list[Any]], kept: float) -> None:
    start = plan(network(), gt.Budget(parameters=kept))
    model = network()
    first, last = run("Riemannian descent", kept, model)
    assert last.train_loss < first.train_loss
    assert first.parameters == last.parameters == start.after <= kept * start.before
    assert start.after > 0.95 * kept * start.before
    ranks = [layer.ranks for layer in start.layers if layer.ranks is not None]
    assert [m.ranks for m in model.modules() if hasattr(m, "ranks")] == ranks


def test_riemannian_descent_projects_and_truncates(data: Any) -> None:
    from methods import METHODS
    from training import Recipe, batches

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    one_step = Recipe(1, rate=10.0, batch=len(data.train_labels), momentum=0.9)
    dense = model[1].weight
    list(METHODS["Riemannian descent"](model, 0.5, data, one_step))
    rank = model[1].ranks[0]
    u, s, v = torch.linalg.svd(dense.detach())
    u, v = u[:, :rank], v[:rank]
    start = (u * s[:rank] @ v).requires_grad_()  # (parallel to) what the network starts from
    with torch.no_grad():
        start *= (dense.norm() / start.norm()) ** 0.75
    images, labels = next(batches(data, one_step, 0))
    loss = nn.functional.cross_entropy(images.flatten(1) @ start.T, labels)
    (z,) = torch.autograd.grad(loss, start)
    tangent = u @ u.T @ z + z @ v.T @ v - u @ u.T @ z @ v.T @ v
    p, s, q = torch.linalg.svd(start.detach() - 10.0 * tangent)
    expected = p[:, :rank] * s[:rank] @ q[:rank]
    assert (expected - start).norm() > 0.1 * start.norm()
    torch.testing.assert_close(model[1].weight.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [0.3, 0.1])
def test_hosvd_is_fine_tuned(data: Any, kept: float) -> None:
    from methods import METHODS

    model, total = network(), sum(p.numel() for p in network().parameters())
    epochs = []
    for epoch in METHODS["HOSVD, fine-tuned"](model, kept, data, recipe(4)):
        epochs.append(epoch)
        if len(epochs) == 3:
            before = [p.clone() for p in model.parameters()]
    dense = list(METHODS["dense"](network(), 1.0, data, recipe(4)))
    assert [e.train_loss for e in epochs[:2]] == [e.train_loss for e in dense[:2]]
    assert [e.epoch for e in epochs] == [1, 2, 3, 4]
    assert epochs[3].train_loss < epochs[2].train_loss < 2.2
    assert epochs[1].parameters == total
    assert 0.95 * kept * total < epochs[3].parameters <= kept * total
    assert all(a.seconds < b.seconds for a, b in pairwise(epochs))
    pairs = zip(before, model.parameters(), strict=True)
    assert all(bool((p != q).any()) for p, q in pairs if p.dim() > 1)  # factors too


def test_fine_tuning_without_an_epoch_before_and_after_divergence(data: Any) -> None:
    from methods import METHODS

    total = sum(p.numel() for p in network().parameters())
    (only,) = METHODS["HOSVD, fine-tuned"](network(), 0.3, data, recipe(1))
    assert only.parameters <= 0.3 * total
    (last,) = METHODS["HOSVD, fine-tuned"](network(), 0.3, data, replace(recipe(2), rate=1e9))
    assert math.isnan(last.train_loss) and last.parameters == total


def tiny() -> nn.Sequential:
    """Return a network in double precision whose second derivatives do not vanish."""
    torch.manual_seed(1)
    conv = nn.Conv2d(1, 2, 2)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(5, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])


def loss_at(model: nn.Module, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the loss at a vector of all weights, and at the biases of the model."""
    first, second = weights.split([8, 24])
    values = {"0.weight": first.reshape(2, 1, 2, 2), "3.weight": second.reshape(3, 8)}
    images, labels = batch()
    logits = torch.func.functional_call(model, values, (images,))
    return nn.functional.cross_entropy(logits / temperature, labels)


def weights_of(model: Any) -> Tensor:
    return torch.cat([model[0].weight.detach().flatten(), model[3].weight.detach().flatten()])


def test_snip_feels_the_masks() -> None:
    from pruning import snip

    model = tiny()
    scores = torch.cat([s.flatten() for s in snip(model, *batch(), 10)])
    weights, eps = weights_of(model), 1e-6
    expected = torch.empty_like(weights)
    for i in range(len(weights)):  # the loss as a function of a mask, at one
        mask = torch.ones_like(weights)
        mask[i] += eps
        above = loss_at(model, weights * mask)
        mask[i] -= 2 * eps
        expected[i] = (above - loss_at(model, weights * mask)).detach() / (2 * eps)
    torch.testing.assert_close(scores, expected.abs(), rtol=1e-6, atol=1e-9)


def test_grasp_is_the_hessian_times_the_gradient() -> None:
    from pruning import TEMPERATURE, grasp

    model = tiny()
    scores = torch.cat([s.flatten() for s in grasp(model, *batch(), 10)])
    weights = weights_of(model)

    def loss(w: Tensor) -> Tensor:
        return loss_at(model, w, TEMPERATURE)

    gradient = torch.autograd.functional.jacobian(loss, weights)
    hessian = torch.autograd.functional.hessian(loss, weights)
    torch.testing.assert_close(scores, weights * (hessian @ gradient), rtol=1e-9, atol=1e-16)

    def flow(w: Tensor) -> float:  # of the gradient, which the weight's removal changes so
        return float(torch.autograd.functional.jacobian(loss, w).square().sum())

    i, eps = int(scores.abs().argmax()), 1e-6
    moved = weights.clone()
    moved[i] *= 1 - eps
    change = (flow(moved) - flow(weights)) / eps
    assert change == pytest.approx(-2 * float(scores[i]), rel=1e-3)


@pytest.mark.parametrize("kept", [0.02, 0.01])
def test_synflow_leaves_no_layer_empty(kept: float) -> None:
    from pruning import allowance, prunable, strongest, synflow

    torch.manual_seed(0)
    sizes = [(64, 8), (8, 64)] * 4  # narrow ones between wide ones
    layers = [layer for m, n in sizes for layer in (nn.Linear(m, n, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers)
    number = allowance(model, kept)
    images, labels = torch.randn(2, 64), torch.zeros(2, dtype=torch.long)
    masks = strongest(synflow(deepcopy(model), images, labels, number), number)
    assert sum(int(mask.sum()) for mask in masks) == number
    assert all(mask.any() for mask in masks)
    for layer, mask in zip(prunable(model), masks, strict=True):
        layer.weight.data = layer.weight.abs() * mask
    assert model(torch.ones(1, 64)).sum() > 0  # a path is left


def test_synflow_is_conserved() -> None:
    from pruning import synflow

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    scores = synflow(deepcopy(model), torch.zeros(4, 5), torch.zeros(4), 56)  # nothing is pruned
    first, second = (model[i].weight.detach().abs().double() for i in (0, 2))
    flow = (second @ first).sum()
    torch.testing.assert_close(scores[0].sum(), flow)
    torch.testing.assert_close(scores[1], second * first.sum(1))


def test_a_share_that_biases_exceed() -> None:
    from pruning import magnitude

    with pytest.raises(ValueError, match=r"kept: expected at least .* as biases stay, got 0\.001"):
        magnitude(network(), 0.001, None, recipe())  # type: ignore[arg-type]
