"""Weights between dense and factorised models: by the HOSVD, at any ranks, all or nothing."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import geotucker as gt
from geotucker_torch import (
    TDLRT,
    TuckerLinear,
    TuckerModule,
    dense_state_dict,
    densify,
    factorize,
    load_weights,
)


def network(seed: int = 0, trained: bool = True) -> nn.Module:
    """Return a dense network in float64, with weights that are no noise unless asked for."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(6, 12, 3, padding=1),
            norm=nn.BatchNorm2d(12),
            flatten=nn.Flatten(),
            fc1=nn.Linear(192, 30),
            fc2=nn.Linear(30, 20, bias=False),
        )
    ).double()
    if trained:
        with torch.no_grad():
            for layer in (model.conv, model.fc1, model.fc2):
                n = layer.weight.shape
                layer.weight += torch.ones(n).double() + 0.3 * torch.randn(n[0], 1).double().view(
                    -1, *[1] * (len(n) - 1)
                )
    return model.eval()


def factorised(ranks: Any = 4, seed: int = 1) -> Any:
    return factorize(network(seed), ranks, verbose=False)


def layers(model: nn.Module) -> dict[str, TuckerModule]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TuckerModule)}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


x = torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "untrained"])
@pytest.mark.parametrize("ranks", [None, 3, 0.3, gt.Tolerance(0.2), {"fc*": 2}], ids=str)
def test_dense_weights_are_decomposed_as_factorize_does_it(ranks: Any, trained: bool) -> None:
    dense = network(trained=trained)
    model = factorised()
    objects, before = dict(model.named_parameters()), layers(model)["conv"].ranks
    result = load_weights(model, dense.state_dict(), ranks)
    assert not result.missing_keys and not result.unexpected_keys
    assert all(objects[name] is p for name, p in model.named_parameters())
    if not trained and isinstance(ranks, gt.Tolerance):
        ranks = gt.Tolerance(0.2, cap=5)  # factorize leaves layers dense that do not shrink
        load_weights(model, dense.state_dict(), ranks)
    rule = {None: 4}.get(ranks, ranks) if not isinstance(ranks, dict) else {**ranks, "conv": before}
    expected = layers(factorize(copy.deepcopy(dense), rule, verbose=False))
    for name, layer in layers(model).items():
        assert layer.ranks == expected[name].ranks
        torch.testing.assert_close(layer.dense_weight(), expected[name].dense_weight())
    assert torch.equal(model.fc1.bias, dense.fc1.bias)
    assert torch.equal(model.norm.weight, dense.norm.weight)


@given(
    shape=st.lists(st.integers(2, 9), min_size=2, max_size=2),
    ranks=st.integers(1, 9),
    start=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_the_loaded_weight_is_the_hosvd(shape: Any, ranks: int, start: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = 1.0 + 0.1 * torch.randn(shape, dtype=torch.float64)  # one singular value stands out
    layer = TuckerLinear(*reversed(shape), ranks=start, bias=False, dtype=torch.float64)
    load_weights(layer, {"weight": weight}, ranks, rescale=False)
    nearest = torch.as_tensor(gt.to_dense(gt.hosvd(weight, ranks)))
    torch.testing.assert_close(layer.dense_weight(), nearest, rtol=0, atol=1e-12)
    back = dense_state_dict(layer.state_dict())
    assert list(back) == ["weight"]
    torch.testing.assert_close(back["weight"], nearest, rtol=0, atol=1e-12)


def test_a_budget_is_one_for_the_whole_model_and_its_end_counts() -> None:
    model, dense = factorised(8), network()
    total = sum(p.numel() for p in dense.parameters())
    load_weights(model, dense.state_dict(), gt.Budget(parameters=0.2, steps=100))
    assert 0.19 * total <= sum(p.numel() for p in model.parameters()) <= 0.2 * total


def test_full_ranks_lose_nothing_there_and_back() -> None:
    dense, model = network(), factorised()
    load_weights(model, dense.state_dict(), gt.Tolerance(0.0))
    torch.testing.assert_close(model(x), dense(x))
    back = dense_state_dict(model.state_dict())
    assert set(back) == set(dense.state_dict())
    torch.testing.assert_close(dict(back), dict(dense.state_dict()))


def test_tucker_weights_are_multiplied_out_for_dense_layers() -> None:
    model, dense = factorised(), network(seed=2)
    state = model.state_dict()
    keys = list(state)
    load_weights(dense, state)
    torch.testing.assert_close(dense(x), model(x))
    assert list(state) == keys  # the state is not changed
    expected = densify(copy.deepcopy(model)).state_dict()
    torch.testing.assert_close(dict(dense_state_dict(state)), dict(expected))


def test_layers_may_be_dense_in_one_model_and_not_in_the_other() -> None:
    source, target = factorised({"conv": 3, "fc1": 5}), factorised({"fc*": 6})
    load_weights(target, source.state_dict())
    assert layers(target)["fc1"].ranks == (5, 5)
    expected = factorize(network(1), {"conv": 3, "fc1": 5, "fc2": 6}, verbose=False)
    torch.testing.assert_close(target(x), expected(x))


def test_a_plain_load_takes_dense_weights_too() -> None:
    dense, model, other = network(), factorised(), factorised()
    model.load_state_dict(dense.state_dict())
    load_weights(other, dense.state_dict())
    for name, layer in layers(model).items():
        loaded = layers(other)[name]
        assert layer.ranks == loaded.ranks
        torch.testing.assert_close(layer.dense_weight(), loaded.dense_weight())


def test_only_weights_that_look_untrained_are_scaled_up_unless_said_otherwise() -> None:
    def energy(trained: bool, rescale: bool | None) -> float:
        model, dense = factorised(), network(trained=trained)
        load_weights(model, dense.state_dict(), 4, rescale=rescale)
        return (model.fc1.core.norm() / dense.fc1.weight.norm()).item()

    assert energy(True, None) == energy(True, False) < energy(True, True)
    assert energy(False, False) < 0.7 < energy(False, None) == energy(False, True)


@pytest.mark.parametrize("ranks", [None, 3])
def test_shared_layers_and_layers_without_values(ranks: Any) -> None:
    def build(device: str | None = None) -> nn.Module:
        layer = TuckerLinear(8, 8, ranks=2, device=device)
        return nn.ModuleDict({"a": layer, "b": layer})

    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    state = nn.ModuleDict({"a": linear, "b": linear}).state_dict()
    model, empty = build(), build("meta")
    load_weights(model, state, ranks)
    load_weights(empty, state, ranks, assign=True)
    assert model["a"] is model["b"] and model["a"].ranks == (ranks or 2,) * 2
    assert_equal(state_of(model), state_of(empty))


def test_low_precision_is_decomposed_in_float32() -> None:
    dense = network().bfloat16()
    model = factorised().bfloat16()
    load_weights(model, dense.state_dict(), gt.Tolerance(0.0))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    error = (model.fc1.dense_weight() - dense.fc1.weight).float().norm()
    assert error < 0.02 * dense.fc1.weight.float().norm()


# Nothing is changed by what does not fit


def without(key: str) -> Any:
    return lambda state: state.pop(key)


def changed(key: str, change: Any) -> Any:
    return lambda state: state.update({key: change(state[key])})


def swapped(state: dict[str, Tensor]) -> None:
    first, second = "fc2.factors.0", "fc2.factors.1"
    state[first], state[second] = state[second], state[first]


FAULTS = [
    (network, without("fc2.weight"), r"Missing key\(s\).*fc2.core"),
    (network, changed("fc2.weight", lambda w: w.T), "size mismatch for fc2.weight"),
    (factorised, without("fc2.core"), r"Missing key\(s\).*fc2.core"),
    (factorised, without("fc2.factors.1"), r"Missing key\(s\).*fc2.factors.1"),
    (factorised, swapped, "size mismatch for fc2.factors.0"),
    (factorised, changed("fc2.core", lambda c: c[None]), "size mismatch for fc2.core"),
]
for source in (network, factorised):
    FAULTS += [
        (source, without("fc1.bias"), r'Missing key\(s\).*"fc1.bias"'),
        (source, lambda state: state.update(more=torch.ones(1)), r"Unexpected key\(s\).*more"),
        (source, changed("fc1.bias", lambda b: b[:-1]), "size mismatch for fc1.bias"),
        (source, changed("norm.weight", lambda w: w.tolist()), r"expected torch\.Tensor"),
    ]


@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize(("source", "fault", "message"), FAULTS)
def test_a_state_that_does_not_fit_changes_nothing(
    source: Any, fault: Any, message: str, ranks: Any
) -> None:
    state = source(seed=5).state_dict()
    fault(state)
    model = factorised()
    before = state_of(model)
    memory = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        load_weights(model, state, ranks)
    assert_equal(state_of(model), before)
    assert [p.data_ptr() for p in model.parameters()] == memory


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_weight_that_is_not_finite_changes_nothing_and_is_named(ranks: Any) -> None:
    state, model = network().state_dict(), factorised()
    state["fc2.weight"][0, 0] = float("nan")
    before = state_of(model)
    with pytest.raises(gt.NonFiniteError, match=r"layer 'fc2': .*NaN"):
        load_weights(model, state, ranks)
    assert_equal(state_of(model), before)


def test_arguments_that_cannot_be_used() -> None:
    model, state = factorised(), network().state_dict()
    before = state_of(model)
    with pytest.raises(gt.RankError, match="pattern 'x' names none of conv, fc1, fc2"):
        load_weights(model, state, {"x": 3})
    with pytest.raises(gt.RankError, match="ranks"):
        load_weights(model, state, -1)
    with pytest.raises(gt.RankError, match="parameters: expected more than"):
        load_weights(model, state, gt.Budget(parameters=10))
    for function in (lambda s: load_weights(model, s), dense_state_dict):
        with pytest.raises(TypeError, match=r"state_dict: .*got str; read files with"):
            function("weights.pt")
    with pytest.raises(TypeError, match="model: expected"):
        load_weights("model", state)  # type: ignore[arg-type]
    assert_equal(state_of(model), before)


def test_parts_of_a_state_load_if_that_is_asked_for() -> None:
    model, state = factorised(), network().state_dict()
    del state["fc2.weight"]
    before = model.fc2.core.detach().clone()
    result = load_weights(model, {**state, "more": torch.ones(1)}, 2, strict=False)
    assert result.unexpected_keys == ["more"]
    assert {key.split(".")[0] for key in result.missing_keys} == {"fc2"}
    assert torch.equal(model.fc2.core, before)
    assert model.fc1.ranks == (2, 2)


def test_what_only_looks_like_a_tucker_tensor_is_left_alone() -> None:
    state = {"a.core": torch.ones(2, 2), "a.factors.0": torch.ones(3, 2), "core": torch.ones(())}
    state |= {"b.core": torch.ones(2), "b.factors.0": torch.ones(3, 4), "c.core": "text"}
    assert dict(dense_state_dict(state)) == state


# Files of others, and a model that an optimizer holds


def trained_at(ranks: Any, every: int = 3) -> tuple[Any, TDLRT]:
    model = factorised(ranks)
    optimizer = TDLRT(torch.optim.Adam(model.parameters(), 1e-3), model, basis_every=every)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: TDLRT) -> float:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("form", ["file", "model"])
def test_safetensors_save_and_load_trained_models(form: str, tmp_path: Any) -> None:
    model, _ = trained_at(4)
    fresh = factorised(2)
    if form == "file":
        safetensors.torch.save_file(model.state_dict(), tmp_path / "file")
        fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "file"))
    else:
        safetensors.torch.save_model(model, str(tmp_path / "file"))
        missing, unexpected = safetensors.torch.load_model(fresh, str(tmp_path / "file"))
        assert not missing and not unexpected
    assert_equal(state_of(fresh), state_of(model))
    for parameter in model.parameters():  # no views: torch.save would write all that is behind
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize


@pytest.mark.parametrize("ranks", [2, 6])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("lifted", [False, True])
def test_training_goes_on_at_the_ranks_that_were_loaded(
    ranks: int, every: int, lifted: bool
) -> None:
    model, optimizer = trained_at(4, every)
    if lifted:
        model(x).square().mean().backward()
    source = factorised(ranks, seed=3)
    load_weights(model, source.state_dict())
    losses = [step(model, optimizer) for _ in range(4)]
    torch.testing.assert_close(losses[0], source(x).square().mean().item())
    assert losses[-1] < losses[0]
    expected = {name: layer.ranks for name, layer in layers(source).items()}
    assert optimizer.ranks == expected


@pytest.mark.parametrize("load", [load_weights, nn.Module.load_state_dict])
def test_dense_weights_amid_a_step_come_to_the_ranks_from_before_it(load: Any) -> None:
    model, optimizer = trained_at(4, every=1)
    before = optimizer.ranks
    model(x).square().mean().backward()
    assert optimizer.ranks != before
    load(model, network().state_dict())
    assert optimizer.ranks == before


def test_a_second_load_takes_nothing_from_the_first() -> None:
    model, source = factorised(), factorised(3, seed=2)
    load_weights(model, source.state_dict())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert all(layer.core.abs().max() > 0 for layer in layers(model).values())
