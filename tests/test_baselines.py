"""The baselines of the benchmarks are what they are called, and keep what they may keep."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geotucker as gt

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the benchmarks are not here")
pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")

BY_TLTORCH = ["Tucker, plain descent", "CP", "TT"]
LOW_RANK = [*BY_TLTORCH, "UV^T, plain descent"]


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


def form_of(name: str) -> Callable[[Any, float], Any]:
    """Return the format of a method of low rank."""
    import decompositions

    formats = {"CP": decompositions.cp, "TT": decompositions.tt}
    formats["Tucker, plain descent"] = decompositions.tucker
    formats["UV^T, plain descent"] = decompositions.matrix
    return formats[name]


@pytest.fixture
def run(data: Any, request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Run a method to its end."""

    def by_name(name: str, kept: float, model: nn.Module | None = None) -> list[Any]:
        from methods import METHODS

        if name in BY_TLTORCH:
            request.getfixturevalue("tltorch")
        return list(METHODS[name](model or network(), kept, data, recipe()))

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


def test_small_layers_stay_dense_while_they_can() -> None:
    from decompositions import at_share, matrix

    model = at_share(network(), 0.3, matrix)
    assert [i for i in (0, 3, 6, 8) if isinstance(model[i], nn.Sequential)] == [3, 6]
    model = at_share(network(), 0.03, matrix)
    assert all(isinstance(model[i], nn.Sequential) for i in (0, 3, 6, 8))
    assert all(model[i][-1].bias is not None for i in (0, 3, 6, 8))


def test_a_share_that_rank_one_exceeds() -> None:
    from decompositions import at_share, matrix

    model = network()
    with pytest.raises(ValueError, match=r"kept: expected at least 0\.0\d+, .* got 0\.01"):
        at_share(model, 0.01, matrix)
    assert isinstance(model[3], nn.Conv2d)


def truncated(name: str, weight: Tensor, size: int) -> Tensor:
    """Return the nearest weight, or nearly, that a format has within a number of entries."""
    if name == "UV^T, plain descent":
        matrix = weight.flatten(1)
        rank = size // sum(matrix.shape)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return (u[:, :rank] * s[:rank] @ v[:rank]).reshape(weight.shape)
    if name == "Tucker, plain descent":
        ranks = gt.Fixed(size / weight.numel()).for_shape(tuple(weight.shape))
        return gt.to_dense(gt.hosvd(weight, ranks))
    assert name == "TT"
    shape = weight.movedim(0, -1).shape
    rest, rank = weight.movedim(0, -1).reshape(shape[0], -1), 1
    cap = max(cap for cap in range(1, 100) if sum(train_sizes(shape, cap)) <= size)
    cores = []
    for n in shape[:-1]:
        u, s, v = torch.linalg.svd(rest.reshape(rank * n, -1), full_matrices=False)
        new = min(cap, len(s))
        cores.append(u[:, :new].reshape(rank, n, new))
        rest, rank = s[:new, None] * v[:new], new
    cores.append(rest.reshape(rank, shape[-1], 1))
    dense = cores[0]
    for core in cores[1:]:
        dense = torch.tensordot(dense, core, 1)
    return dense.squeeze((0, -1)).movedim(-1, 0)


def entries(layer: nn.Module) -> int:
    """Return the number of parameters without biases."""
    return sum(p.numel() for name, p in layer.named_parameters() if "bias" not in name)


def train_sizes(shape: torch.Size, cap: int) -> list[int]:
    """Return the sizes of the cores of a tensor train with ranks up to a cap."""
    cuts = range(1, len(shape))
    inner = [min(cap, math.prod(shape[:i]), math.prod(shape[i:])) for i in cuts]
    ranks = [1, *inner, 1]
    return [a * n * b for a, n, b in zip(ranks, shape, ranks[1:], strict=False)]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["Tucker, plain descent", "TT", "UV^T, plain descent"])
def test_low_rank_starts_from_the_truncated_network(name: str, trained: bool, tltorch: Any) -> None:
    conv = network().double().requires_grad_(False)[3]
    if trained:  # something stands out of the noise
        conv.weight += 1
    product = form_of(name)(conv, 0.3 * conv.weight.numel())
    layer = product.build()
    weight = truncated(name, conv.weight, product.size)
    gain = 1.0 if trained else float(conv.weight.norm() / weight.norm()) ** 0.75
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    biases = layer.bias if name == "Tucker, plain descent" else None
    expected = torch.conv2d(x, gain * weight, biases, stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected)
    assert entries(layer) == product.size <= 0.3 * conv.weight.numel()


@pytest.mark.parametrize("name", LOW_RANK)
def test_products_are_as_large_as_dense_layers(name: str, tltorch: Any) -> None:
    linear = nn.Linear(48, 30, bias=False).double()
    product = form_of(name)(linear, 0.9 * linear.weight.numel())
    layer = product.build()
    assert entries(layer) == product.size <= 0.9 * linear.weight.numel()
    x = torch.randn(500, 48, dtype=torch.float64)
    with torch.no_grad():
        assert 0.5 < float(layer(x).std() / linear(x).std()) < 2
