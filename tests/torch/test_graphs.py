"""Layers that an optimizer moves are as other layers to autograd, and to who uses it by hand."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from geotucker_torch import (
    TDLRT,
    TuckerConv1d,
    TuckerConv2d,
    TuckerEmbedding,
    TuckerLinear,
    TuckerTensorEmbedding,
    TuckerTensorLinear,
)

from .cases import sgd

INTEGRATORS = ("tangent", "tdlrt")
X = torch.linspace(-1.0, 1.0, 3 * 12).reshape(3, 12).double()
INDICES = torch.tensor([1, 5, 5])


def layers():
    """Return layers with inputs that are not of floating dtype where they are indices."""
    return {
        "linear": (TuckerLinear(12, 10, 3), X),
        "sequences": (TuckerLinear(12, 10, 3), X[None].repeat(2, 1, 1)),
        "convolution": (TuckerConv2d(3, 8, 3, ranks=2), X.reshape(1, 3, 3, 4)),
        "groups": (TuckerConv1d(4, 8, 1, ranks=2, groups=2), X.reshape(3, 4, 3)),
        "unbatched": (TuckerConv1d(12, 8, 1, ranks=2), X.T.contiguous()),
        "tensor": (TuckerTensorLinear((3, 4), (2, 5), 2, bias=False), X),
        "embedding": (TuckerEmbedding(12, 10, 3), INDICES),
        "tensor embedding": (TuckerTensorEmbedding((3, 4), (2, 5), 2), INDICES),
    }


@pytest.fixture(params=layers())
def moved(request):
    """Return a model of a layer whose bases an optimizer moves, that optimizer, and an input."""
    torch.manual_seed(0)
    layer, x = layers()[request.param]
    model = nn.Sequential(layer.double())
    return model, TDLRT(sgd(model), model), x.clone()


def test_outputs_can_be_changed_in_place(moved):
    model, _, x = moved
    expected = model(x).sigmoid().square().sum()
    nn.Sigmoid()(model(x)).square().sum().backward()
    gradient = model[0].core.grad.clone()
    model.zero_grad()
    loss = model(x).sigmoid_().square().sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(model[0].core.grad, gradient)


def test_a_graph_is_free_after_backward(moved):
    model, _, x = moved
    loss = model(x).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_inputs_that_have_changed_are_noticed(moved):
    model, _, x = moved
    y = model(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("autocast", [False, True])
def test_activations_live_no_longer_than_the_graph_needs_them(integrator, autocast):
    model = nn.Sequential(TuckerLinear(12, 12, 3), TuckerLinear(12, 12, 3))
    optimizer = TDLRT(sgd(model), model, integrator=integrator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model[0](X.float())
        between = weakref.ref(hidden)
        loss = model[1](hidden).float().square().sum()
    del hidden
    assert autocast or between() is not None
    loss.backward()
    assert between() is None
    optimizer.step()
    assert loss.isfinite()


def test_hooks_on_saved_tensors_see_the_activations_and_no_weights():
    model = nn.Sequential(TuckerLinear(12, 10, 3))
    optimizer = TDLRT(sgd(model), model)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        model(X.float().repeat(50, 1)).sum()
    assert sizes == [150 * 12, 150 * 3]  # input, and what the output's factor is applied to
    assert optimizer.ranks == {"0": (3, 3)}


def test_checkpoints_that_are_not_reentrant_keep_nothing_and_change_nothing(moved):
    model, _, x = moved
    model(x).sin().sum().backward()
    gradient, ranks = model[0].core.grad.clone(), model[0].ranks
    model.zero_grad()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = checkpoint(lambda x: model(x).sin().sum(), x, use_reentrant=False)
    assert not [tensor for tensor in kept if tensor.shape == x.shape and tensor is not x]
    loss.backward()
    assert model[0].ranks == ranks
    torch.testing.assert_close(model[0].core.grad, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_penalties_on_parameters_add_to_the_gradient(moved, integrator):
    model, _, x = moved
    optimizer = TDLRT(sgd(model), model, integrator=integrator)
    core = model[0].core
    ranks, before = core.shape, core.detach().clone()
    model(x).square().sum().backward()
    bare = core.grad.clone()
    optimizer.zero_grad()
    (model(x).square().sum() + 0.5 * core.square().sum()).backward()
    difference = core.grad - bare
    own = tuple(slice(rank) for rank in ranks)
    torch.testing.assert_close(difference[own], before, rtol=0, atol=1e-12)
    difference[own] = 0.0
    torch.testing.assert_close(difference, torch.zeros_like(difference), rtol=0, atol=1e-12)
    optimizer.step()


def test_parameters_that_are_passed_in_have_gradients_of_their_own(moved):
    model, _, x = moved
    given = {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()}
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def slope():
        scaled = {name: scale * p for name, p in given.items()}
        y = torch.func.functional_call(model, scaled, (x,)).sum()
        return torch.autograd.grad(y, scale)[0]

    torch.testing.assert_close(slope(), torch.func.grad(lambda s: value(model, given, x, s))(scale))
    assert model[0].core.grad is None


def value(model, given, x, scale):
    scaled = {name: scale * p for name, p in given.items()}
    return torch.func.functional_call(model, scaled, (x,)).sum()


def test_gradients_that_the_model_drops_take_their_bases_along(moved):
    model, optimizer, x = moved
    model(x).square().sum().backward()
    expected = model[0].core.grad.clone()
    optimizer.zero_grad()
    model(x).flatten()[:2].sum().backward()  # another loss, whose gradients are not used
    assert model[0].core.shape != model[0].settled_ranks
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(model[0].core.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_gradients_that_the_model_drops_under_checkpoints(reentrant):
    weights = []
    for dropped_by_model in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(TuckerLinear(12, 12, 3)).double()
        optimizer = TDLRT(sgd(model), model)
        x = X.clone().requires_grad_()

        def run(x, model=model):
            if reentrant is None:
                return model(x)
            return checkpoint(model, x, use_reentrant=reentrant)

        run(x).square().sum().backward()
        (model if dropped_by_model else optimizer).zero_grad()
        run(x.tanh()).sum().backward()
        optimizer.step()
        weights.append(model[0].dense_weight())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", ["forgotten", "reentrant"])
def test_uses_that_could_not_be_known_of_count(case):
    torch.manual_seed(0)
    model = nn.Sequential(TuckerLinear(12, 12, 3, bias=False).double())
    optimizer, layer = TDLRT(sgd(model), model, integrator="tdlrt"), model[0]
    weight, x = layer.dense_weight().detach().requires_grad_(), X.clone().requires_grad_()
    (torch.tanh(x @ weight.T) @ weight.T).square().sum().backward()
    hidden = checkpoint(layer, x, use_reentrant=True) if case == "reentrant" else layer(x)
    loss = layer(torch.tanh(hidden)).square().sum()
    if case == "forgotten":
        optimizer.zero_grad()
    loss.backward()
    assert layer.settled_ranks == (3, 3)
    rows, columns = (factor.detach() for factor in layer.factors)
    expected = rows.T @ weight.grad @ columns
    torch.testing.assert_close(layer.core.grad, expected, rtol=0, atol=1e-12)
    optimizer.step()
    assert optimizer.ranks == {"0": (3, 3)}


def test_aliases_that_are_passed_in_amid_a_step_change_nothing(moved):
    model, optimizer, x = moved
    model(x).square().sum().backward()
    state, ranks = optimizer.ranks, model[0].settled_ranks
    model_of_aliases = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, model_of_aliases, (x,))
    assert optimizer.ranks == state
    optimizer.step()
    assert model[0].ranks == ranks


@pytest.mark.filterwarnings("ignore")
def test_a_trace_does_not_lift():
    model = nn.Sequential(TuckerLinear(12, 10, 3).double())
    optimizer = TDLRT(sgd(model), model)
    traced = torch.jit.trace(model.eval(), X)
    torch.testing.assert_close(traced(X), model(X))
    assert optimizer.ranks == {"0": (3, 3)}


@pytest.mark.parametrize("name", [name for name in layers() if name != "unbatched"])
def test_empty_batches_pass(name):
    layer, x = layers()[name]
    model = nn.Sequential(layer.double())
    optimizer = TDLRT(sgd(model), model)
    model(x[:0]).sum().backward()
    optimizer.step()
    assert torch.isfinite(model[0].core).all()


def test_autocast_leaves_double_precision_alone(moved):
    model, _, x = moved
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        with torch.no_grad():
            expected = model(x)
    assert y.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(y, expected)
