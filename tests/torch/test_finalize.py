"""Finalised models: plain modules that compute the same, the smallest or cheapest of them."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from geotucker_torch import (
    TDLRT,
    TuckerConv2d,
    TuckerLinear,
    TuckerModule,
    factorize,
    finalize,
)
from geotucker_torch._inference import candidates

from .cases import DOUBLE, close, convolutions, embeddings, image, linears, network, transposed


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def children(module: nn.Module) -> list[str]:
    """Return the names of a chain's members; a dense layer has none."""
    return [name for name, _ in module.named_children()]


def is_plain(model: nn.Module) -> bool:
    return not any("geotucker" in type(module).__module__ for module in model.modules())


# Layers

every = st.one_of(linears(), convolutions(), embeddings(), transposed())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(
    st.one_of(linears(), convolutions(), embeddings(), transposed()),
    st.sampled_from(["parameters", "flops"]),
)
def test_every_layer_computes_the_same(case: tuple[TuckerModule, Tensor], cost: Any) -> None:
    layer, x = case
    plain = finalize(layer, cost=cost)
    assert is_plain(plain)
    close(plain(x), layer(x))
    close(finalize(layer, dense="")(x), layer(x))


@given(every)
def test_no_candidate_is_smaller(case: tuple[TuckerModule, Tensor]) -> None:
    layer, _ = case
    others = candidates(layer).values()
    plain, least = finalize(layer), min(map(count, others))
    assert count(plain) == least
    fewest = min(len(list(m.children())) for m in others if count(m) == least)
    assert len(children(plain)) == fewest


def flops(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("ranks", [(4, 4, 3, 3), (7, 2, 3, 3), (2, 7, 3, 3)])
def test_no_candidate_takes_fewer_operations(
    ranks: tuple[int, ...], stride: int, kernel: int, groups: int
) -> None:
    ranks = (*ranks[:2], *(min(r, kernel) for r in ranks[2:]))
    layer = TuckerConv2d(8 * groups, 8 * groups, kernel, ranks, stride=stride, groups=groups)
    # Outputs are then a `stride`-th of the inputs, exactly, as they nearly are in large images.
    layer.padding = (kernel // 2, kernel // 2)
    x = torch.randn(1, 8 * groups, 12, 12)
    plain = finalize(layer, cost="flops")
    assert flops(plain, x) == min(flops(other, x) for other in candidates(layer).values())


def test_the_costs_differ_where_a_kernel_strides() -> None:
    layer = TuckerConv2d(8, 8, 3, ranks=4, stride=3)
    assert children(finalize(layer)) == ["project", "kernel", "spread"]
    assert children(finalize(layer, cost="flops")) == ["kernel", "spread"]


def test_full_ranks_become_dense() -> None:
    model = finalize(nn.Sequential(TuckerLinear(8, 6, ranks=6), TuckerConv2d(4, 4, 3, ranks=4)))
    assert [type(module) for module in model] == [nn.Linear, nn.Conv2d]


def test_half_precision_is_folded_in_single() -> None:
    layer = TuckerConv2d(32, 32, 3, ranks=8, padding=1)
    plain = finalize(copy.deepcopy(layer).to(torch.bfloat16))
    x = torch.randn(2, 32, 6, 6)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(plain(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.05)
    exact = finalize(layer)
    torch.testing.assert_close(
        plain.kernel.weight.float(), exact.kernel.weight, rtol=0.02, atol=0.02
    )


def test_the_meta_device() -> None:
    plain = finalize(TuckerLinear(50, 50, ranks=2, device="meta"))
    assert {p.device.type for p in plain.parameters()} == {"meta"}
    assert count(plain) == 250


# Models


def test_the_model_is_untouched_and_shares_nothing() -> None:
    model = network()
    before, state = copy.deepcopy(model), torch.random.get_rng_state()
    objects = [id(x) for x in (*model.modules(), *model.parameters())]
    plain = finalize(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [id(x) for x in (*model.modules(), *model.parameters())] == objects
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for parameter in plain.parameters():
        assert parameter.untyped_storage().data_ptr() not in own
        assert parameter.is_contiguous()


def test_modes_are_kept() -> None:
    model = network()
    assert all(module.training for module in finalize(model).modules())
    model[3].eval()
    plain = finalize(model)
    assert not any(module.training for module in plain[3].modules())
    assert all(module.training for module in (plain, plain[1], *plain[4].modules()))
    assert not any(module.training for module in finalize(model.eval()).modules())


def test_what_was_trained_is_trained() -> None:
    model = network()
    model[3].core.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    plain = finalize(model)
    flags = {name: p.requires_grad for name, p in plain.named_parameters()}
    frozen = {"3.project.weight", "3.kernel.weight", "3.spread.weight", "6.kernel.bias"}
    assert {name for name, is_trained in flags.items() if not is_trained} == frozen


def test_gradients_are_those_of_the_model() -> None:
    model, x = network(), image()
    plain = finalize(model)
    for m in (model, plain):
        m(x).square().sum().backward()
    close(plain[0].weight.grad, model[0].weight.grad)
    close(plain[6].kernel.bias.grad, model[6].bias.grad)
    assert all(p.grad.norm() > 0 for p in plain.parameters())


def test_a_finalised_model_is_fine_tuned() -> None:
    plain, x = finalize(network()), image()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(plain(x).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_shared_layers_and_tied_biases_stay_so() -> None:
    layer = TuckerLinear(9, 9, ranks=2, **DOUBLE)
    model = nn.ModuleDict(
        {"a": layer, "b": nn.Sequential(layer, nn.ReLU()), "c": TuckerLinear(9, 9, 2, **DOUBLE)}
    )
    model["c"].bias = layer.bias
    plain = finalize(model)
    assert plain["a"] is plain["b"][0]
    assert plain["c"] is not plain["a"]
    assert plain["c"].kernel.bias is plain["a"].kernel.bias


def test_the_root_itself() -> None:
    layer = TuckerLinear(50, 40, ranks=3, **DOUBLE)
    x = torch.randn(50, **DOUBLE)
    plain = finalize(layer)
    assert children(plain) == ["project", "kernel"]
    close(plain(x), layer(x))


def test_models_without_tucker_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    plain = finalize(model)
    assert plain is not model
    assert repr(plain) == repr(model)


def test_bases_lifted_for_a_step_do_not_count() -> None:
    model = factorize(nn.Sequential(nn.Linear(30, 20, **DOUBLE)), 2, verbose=False)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1), model)
    x = torch.randn(4, 30, **DOUBLE)
    model(x).sum().backward()
    assert model[0].ranks != (2, 2)
    plain = finalize(model)
    assert plain[0].project.out_features == 2
    close(plain(x), model(x))
    assert model[0].ranks != (2, 2)
    optimizer.step()


def test_hooks_on_other_modules_are_kept() -> None:
    model, seen = network(), []
    model.register_forward_hook(lambda module, args, y: seen.append("model"))
    model[1].register_forward_pre_hook(lambda module, args: seen.append("norm"))
    finalize(model)(image())
    assert seen == ["norm", "model"]


def encoder() -> nn.Module:
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
    return factorize(nn.TransformerEncoder(block, 2), 2, verbose=False)


def test_encoders_of_pytorch() -> None:
    model, x = encoder().eval(), torch.randn(2, 5, 16, **DOUBLE)
    plain = finalize(model)
    assert is_plain(plain)
    for mode in (True, False):
        model.train(mode), plain.train(mode)
        close(plain(x), model(x))
        with torch.no_grad():  # the fast path, which reads weights
            close(plain(x), model(x))
    padding = torch.zeros(2, 5).index_fill(1, torch.tensor([4]), 1).bool()
    with torch.no_grad():
        close(plain(x, None, padding), model(x, None, padding))


class Reader(nn.Module):
    """Reads a layer's weight in its forward pass, as some models do for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = TuckerLinear(50, 50, 1, **DOUBLE)
        self.other = TuckerLinear(50, 50, 1, **DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(x.to(self.layer.weight.dtype)))


def test_layers_whose_weight_is_read_become_dense() -> None:
    model, x = nn.Sequential(Reader()), torch.randn(3, 50)
    layer = model[0].layer
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        finalize(model)(x)
    for dense in ("0.layer", ["*.layer", "0"], lambda name, module: module is layer):
        plain = finalize(model, dense=dense)
        assert type(plain[0].layer) is nn.Linear
        assert children(plain[0].other) == ["project", "kernel"]
        close(plain(x), model(x))


def test_layers_of_tensorly_torch_stay(tltorch: Any) -> None:
    other = tltorch.FactorizedLinear((2, 4), (3, 4), factorization="tucker", rank=0.5)
    plain = finalize(nn.Sequential(other, TuckerLinear(12, 30, ranks=2)))
    assert type(plain[0]) is type(other)
    assert children(plain[1]) == ["project", "kernel"]
    torch.testing.assert_close(plain[0].state_dict(), other.state_dict(), rtol=0, atol=0)


# What is refused


def unchanged(model: nn.Module) -> bool:
    return all(isinstance(module, TuckerModule) for module in model)


def test_layers_that_a_module_would_not_replace() -> None:
    class Scaled(TuckerLinear):
        """More than its base."""

    model = nn.Sequential(TuckerLinear(4, 4, 1), TuckerLinear(4, 4, 1), Scaled(4, 4, 1))
    model[1].register_forward_hook(lambda *args: None)
    message = r"'1' \(it has hooks, .*\), '2' \(a subclass, .*\); remove the hooks"
    with pytest.raises(ValueError, match=message):
        finalize(model)
    assert unchanged(model)
    model[0].register_buffer("scale", torch.ones(()))
    with pytest.raises(ValueError, match=r"'0' \(it holds more than core, factors and bias\)"):
        finalize(model)


def test_bad_arguments() -> None:
    model = nn.Sequential(TuckerLinear(4, 4, 1))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        finalize([model])  # type: ignore[arg-type]
    for cost in ("time", None, ["flops"]):
        with pytest.raises(ValueError, match=r"cost: expected 'parameters' or 'flops', got"):
            finalize(model, cost=cost)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dense: expected a pattern, several, or a predicate"):
        finalize(model, dense=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dense: .* got 'fc\*', which matches none"):
        finalize(model, dense=["0", "fc*"])
    assert unchanged(model)
