"""Compiled models in training, and the transforms of torch.func."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, jacrev, vmap

import geotucker as gt
from geotucker_torch import TDLRT, TuckerConv2d, TuckerLinear, TuckerTensorLinear


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = TuckerConv2d(2, 8, 3, ranks=(6, 2, 3, 3))
        self.norm = nn.BatchNorm2d(8)
        self.hidden = TuckerLinear(72, 16, 8)
        self.tensor = TuckerTensorLinear((4, 4), (4, 4), 3)
        self.head = TuckerLinear(16, 3, 3)

    def forward(self, x):
        x = self.norm(self.conv(2 * x)).relu().flatten(1)
        return self.head(self.tensor(self.hidden(x).relu()).relu()).log_softmax(1)


def build():
    torch.manual_seed(0)
    return Network()


def train(compiled, rule, steps=14, **options):
    model = build()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.05, 0.9), model, rule, **options)
    forward = torch.compile(model, backend="eager") if compiled else model
    x, y = torch.randn(32, 2, 5, 5), torch.randint(3, (32,))
    ranks, losses = set(), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        ranks.add(tuple(optimizer.ranks.items()))
        losses.append(loss.item())
    return losses, ranks


# Dynamo looks at gradients of what it is given; outside of pytest the warning is not shown.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("options", [{}, {"basis_every": 2}, {"integrator": "tdlrt"}])
def test_no_change_of_rank_compiles_anything_anew(options):
    rule = gt.Budget(parameters=0.35, steps=12)
    expected, ranks = train(False, rule, **options)
    got, _ = train(True, rule, **options)
    assert got == expected
    assert len(ranks) > 4
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    torch._dynamo.reset()
    counters.clear()
    train(True, gt.Fixed(2), steps=2, **options)
    assert counters["stats"]["unique_graphs"] == graphs


def test_layers_compile_whole_where_no_optimizer_moves_them():
    model = build()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.05), model)
    x = torch.randn(4, 2, 5, 5)
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    del optimizer
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(x), model(x))


def test_transforms_of_torch_func_see_ordinary_functions():
    model = build().eval()
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.05), model)
    x, y = torch.randn(5, 2, 5, 5), torch.randint(3, (5,))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    before = optimizer.ranks

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    found = grad(loss)(parameters, x, y)
    each = vmap(grad(lambda p, x, y: loss(p, x[None], y[None])), (None, 0, 0))(parameters, x, y)
    jacobian = jacrev(model)(x[:1])
    assert optimizer.ranks == before
    assert all(layer.armed for layer in (model.conv, model.hidden, model.tensor, model.head))
    assert jacobian.shape == (1, 3, 1, 2, 5, 5)
    del optimizer
    expected = torch.autograd.grad(
        nn.functional.cross_entropy(model(x), y), [p for p in model.parameters() if p.requires_grad]
    )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(each[name].mean(0), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_with_its_optimizer_is_exported(trained):
    model, x = build(), torch.randn(4, 2, 5, 5)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.05), model)
    if trained:
        model(x).square().mean().backward()
        optimizer.step()
    model.eval()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))
    assert optimizer.ranks
