"""Whole models: what is replaced, what is not and why, and the way back."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import geotucker as gt
from geotucker_torch import (
    TDLRT,
    Factorization,
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerLinear,
    TuckerModule,
    densify,
    factorize,
    plan,
)


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 10, 5), nn.ReLU(), nn.Conv2d(10, 20, 5), nn.ReLU())
    return nn.Sequential(
        features, nn.Flatten(), nn.Linear(20 * 64, 50), nn.ReLU(), nn.Linear(50, 10)
    ).double()


def image() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 1, 16, 16, dtype=torch.float64)


def tucker_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, TuckerModule)]


def snapshot(model: nn.Module) -> list[tuple[str, int, Any]]:
    """Describe every parameter by name, identity and values."""
    return [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()]


def assert_untouched(model: nn.Module, before: list[tuple[str, int, Any]]) -> None:
    after = snapshot(model)
    assert [entry[:2] for entry in after] == [entry[:2] for entry in before]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))


def reasons(model: nn.Module, ranks: Any = 2, **options: Any) -> dict[str, str]:
    return {row.name: row.reason for row in plan(model, ranks, **options).layers}


# Replacing and going back


def test_exact_ranks_compute_the_same_and_densify_goes_back() -> None:
    low = nn.Linear(60, 50, dtype=torch.float64)
    with torch.no_grad():
        low.weight.copy_(low.weight[:, :3] @ low.weight[:3])
    model = nn.Sequential(low, nn.Linear(50, 4, dtype=torch.float64))
    original, x = copy.deepcopy(model), torch.randn(3, 60, dtype=torch.float64)
    expected = model(x)
    assert factorize(model, gt.Tolerance(1e-9), verbose=False) is model
    assert model[0].ranks == (3, 3)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    assert densify(model) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    assert repr(model) == repr(original)
    torch.testing.assert_close(model.state_dict(), original.state_dict(), rtol=1e-11, atol=1e-11)


def test_truncated_model_has_the_hosvd_of_each_weight() -> None:
    model, original = lenet(), lenet()
    factorize(model, 0.2, rescale=False, verbose=False)
    assert tucker_names(model) == ["0.0", "0.2", "2", "4"]
    for name in tucker_names(model):
        layer, dense = model.get_submodule(name), original.get_submodule(name)
        assert layer.ranks == gt.Fixed(0.2).for_shape(dense.weight.shape)
        point = gt.hosvd(dense.weight.detach(), 0.2)
        torch.testing.assert_close(layer.dense_weight(), gt.to_dense(point))
    before = model(image())
    torch.testing.assert_close(densify(model)(image()), before)
    assert tucker_names(model) == []


def test_every_kind_of_layer_gets_its_own() -> None:
    dense = [nn.Linear(9, 9), nn.Conv1d(9, 9, 3), nn.Conv2d(9, 9, 3), nn.Conv3d(9, 9, 3)]
    model = factorize(nn.Sequential(*dense), 1, verbose=False)
    assert [type(layer) for layer in model] == [
        TuckerLinear,
        TuckerConv1d,
        TuckerConv2d,
        TuckerConv3d,
    ]


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_types_select(kind: type[nn.Module]) -> None:
    for types in (kind, [kind], iter((kind,))):
        model = lenet()
        wanted = [name for name, module in model.named_modules() if type(module) is kind]
        assert tucker_names(factorize(model, 1, types=types, verbose=False)) == wanted


def test_the_root_itself_is_returned_replaced() -> None:
    dense = nn.Linear(9, 8)
    layer = factorize(dense, 2, verbose=False)
    assert isinstance(layer, TuckerLinear)
    assert layer.bias is dense.bias
    back = densify(layer)
    assert type(back) is nn.Linear
    assert back.bias is dense.bias
    assert "(the model)" in str(plan(dense, 2))


def test_biases_stay_and_modes_are_kept() -> None:
    model = lenet().eval()
    model[2].weight.requires_grad_(False)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    for step in (lambda m: factorize(m, 0.2, verbose=False), densify):
        step(model)
        after = dict(model.named_parameters())
        assert all(after[name] is bias for name, bias in biases.items())
        assert not any(module.training for module in model.modules())
    assert not model[2].weight.requires_grad
    assert model[4].weight.requires_grad


def test_layers_without_bias() -> None:
    model = nn.Sequential(nn.Linear(9, 8, bias=False))
    assert densify(factorize(model, 2, verbose=False))[0].bias is None


def test_a_shared_layer_becomes_one_shared_layer() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.Linear(8, 8)})
    table = plan(model, 1, include="b.*")
    assert [row.names for row in table.layers] == [("a", "b.0"), ("c",)]
    assert [row.reason for row in table.layers] == ["", "not included"]
    assert "a = b.0" in str(table)
    factorize(model, 1, verbose=False)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], TuckerLinear)
    assert plan(nn.Sequential(shared, shared), 1).after == 1 + 8 + 8 + 8
    densify(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is nn.Linear


def test_factorizing_twice_changes_nothing_more() -> None:
    model = factorize(lenet(), 0.2, verbose=False)
    before = snapshot(model)
    assert plan(model, 0.1).layers == ()
    assert_untouched(factorize(model, 0.1, verbose=False), before)


def test_a_model_without_data_loads_a_checkpoint() -> None:
    trained = factorize(lenet(), 0.3, verbose=False)
    with torch.device("meta"):
        model = lenet()
    factorize(model, 1, verbose=False)
    model.load_state_dict(trained.state_dict(), assign=True)
    torch.testing.assert_close(model(image()), trained(image()))


def test_a_model_without_data_has_no_singular_values() -> None:
    with torch.device("meta"):
        model = lenet()
    with pytest.raises(gt.RankError, match=r"layer '0\.0': ranks: Tolerance.* singular values"):
        factorize(model, gt.Tolerance(0.1), verbose=False)
    assert tucker_names(model) == []


def test_replaced_models_train() -> None:
    model = factorize(lenet(), 0.2, verbose=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(image()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


# Selection


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, ["0.0", "0.2", "2", "4"]),
        ("0.*", None, ["0.0", "0.2"]),
        (["0.2", "[2-4]"], None, ["0.2", "2", "4"]),
        (("4",), None, ["4"]),
        ([], None, []),
        (None, "0.*", ["2", "4"]),
        ("0.*", ["*.0"], ["0.2"]),
        (lambda name, module: module.bias.numel() == 10, None, ["0.0", "4"]),
        (None, lambda name, module: isinstance(module, nn.Linear), ["0.0", "0.2"]),
    ],
)
def test_include_and_exclude(include: Any, exclude: Any, expected: list[str]) -> None:
    model = factorize(lenet(), 1, include=include, exclude=exclude, verbose=False)
    assert tucker_names(model) == expected


def test_ranks_by_pattern_the_first_match_counts() -> None:
    ranks = {"0.2": (4, 3, 2, 5), "0.*": 1, "4": gt.Tolerance(0.9), "5": 2}
    table = plan(lenet(), ranks)
    rows = {row.name: row for row in table.layers}
    assert rows["0.0"].ranks == (1, 1, 1, 1)
    assert rows["0.2"].ranks == (4, 3, 2, 5)
    assert rows["2"].ranks is None
    assert rows["2"].reason == "no pattern of ranks matches"
    assert rows["4"].ranks == gt.hosvd(lenet()[4].weight.detach(), gt.Tolerance(0.9)).ranks
    assert table.unmatched == ("5",)
    assert str(table).endswith("note: the pattern '5' matches no layer")


def test_patterns_without_a_match_are_named() -> None:
    table = plan(lenet(), 1, include=["0.*", "fc*"], exclude="head")
    assert table.unmatched == ("fc*", "head")
    assert plan(lenet(), 1, include="0.*", exclude=lambda name, module: False).unmatched == ()


class Loudest:
    """A rule for a whole network: rank 2 for the tensor of largest norm, 1 for the others."""

    def __repr__(self) -> str:
        return "Loudest()"

    def __call__(self, spectra: Any) -> list[tuple[int, ...]]:
        norms = [float((s.values[0] ** 2).sum()) for s in spectra]
        return [
            (2 if n == max(norms) else 1,) * len(s.shape)
            for n, s in zip(norms, spectra, strict=True)
        ]


def test_a_rule_for_the_network_sees_all_layers_at_once() -> None:
    model = nn.Sequential(*[nn.Linear(9, 8) for _ in range(3)])
    with torch.no_grad():
        model[1].weight.mul_(5)
    weight = model[1].weight.detach().clone()
    assert [row.ranks for row in plan(model, Loudest()).layers] == [(1, 1), (2, 2), (1, 1)]
    factorize(model, Loudest(), rescale=False, verbose=False)
    assert [layer.ranks for layer in model] == [(1, 1), (2, 2), (1, 1)]
    nearest = gt.to_dense(gt.hosvd(weight, 2))
    torch.testing.assert_close(model[1].dense_weight(), nearest, rtol=1e-4, atol=1e-5)


# What stays dense


def test_layers_that_would_not_shrink() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(9, 9))
    found = reasons(model, gt.Fixed(2))
    assert found["0"] == "would grow: 20 for 16 weights at ranks (2, 2)"
    assert found["1"] == "would grow: 16 for 8 weights at ranks (2, 2)"
    assert found["2"] == ""
    tie = nn.Linear(3, 2)
    assert reasons(tie, 1)[""] == "would not shrink: 6 for 6 weights at ranks (1, 1)"
    assert factorize(tie, 1, verbose=False) is tie


def test_weights_that_are_parameters_elsewhere() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(9, 9)
            self.mine = self.layer.weight

    model = Holder()
    assert "tied" in reasons(model)["layer"]
    before = snapshot(model)
    factorize(model, 2, verbose=False)
    assert_untouched(model, before)


def test_embeddings_that_do_more() -> None:
    model = nn.ModuleDict(
        {"norm": nn.Embedding(9, 9, max_norm=1.0), "sparse": nn.Embedding(9, 9, sparse=True)}
    )
    assert reasons(model) == {
        "norm": "max_norm, which changes the weight in every lookup",
        "sparse": "sparse gradients, which cores do not have",
    }


def test_computed_weights() -> None:
    model = nn.ModuleDict(
        {
            "parametrized": parametrizations.weight_norm(nn.Linear(9, 9)),
            "orthogonal": parametrizations.orthogonal(nn.Linear(9, 9)),
            "spectral": spectral_norm(nn.Linear(9, 9)),
            "pruned": prune.l1_unstructured(nn.Linear(9, 9), "weight", 0.5),
        }
    )
    assert set(reasons(model).values()) == {"its weight is computed from other parameters"}
    assert sorted(reasons(model)) == sorted(model)


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyLinear(50), nn.LazyConv2d(8, 3))
    assert all("lazy" in reason for reason in reasons(model).values())
    assert "?" in str(plan(model, 2))
    factorize(model, 2, verbose=False)
    assert type(model[0]) is nn.LazyLinear
    model[0](torch.ones(1, 60))
    assert reasons(model)["0"] == ""


def test_layers_that_a_new_one_would_not_replace() -> None:
    class Scaled(nn.Linear):
        """More than its base."""

    hooked, patched, buffered = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)
    handle = hooked.register_forward_hook(lambda *args: None)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    buffered.register_buffer("mask", torch.ones(9))
    model = nn.ModuleDict(
        {
            "scaled": Scaled(9, 9),
            "hooked": hooked,
            "patched": patched,
            "buffered": buffered,
            "complex": nn.Linear(9, 9, dtype=torch.complex64),
        }
    )
    found = reasons(model)
    assert "subclass" in found["scaled"]
    assert "hooks" in found["hooked"]
    assert "hooks" in found["patched"]
    assert "more than weight and bias" in found["buffered"]
    assert found["complex"] == "its weight is complex64"
    handle.remove()
    assert reasons(model)["hooked"] == ""


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_layers() -> None:
    assert reasons(nn.Linear(0, 5))[""] == "its weight is empty"


# The table


def test_the_table() -> None:
    model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10), nn.LayerNorm(10))
    rule = "-" * 104
    assert str(plan(model, 8)).splitlines() == [
        "layer          type    shape      ranks   before  after",
        rule,
        "0              Linear  (50, 100)  (8, 8)   5,050  1,314  26.0 %",
        "2              Linear  (10, 50)   dense      510    510  "
        "would grow: 544 for 500 weights at ranks (8, 8)",
        rule,
        "1 of 2 layers                              5,050  1,314  26.0 %",
        "whole model                                5,580  1,844  33.0 %",
    ]


def test_factorize_prints_what_plan_says(capsys: pytest.CaptureFixture[str]) -> None:
    model = lenet()
    before = snapshot(model)
    table = plan(model, 0.1)
    assert isinstance(table, Factorization)
    assert capsys.readouterr().out == ""
    assert_untouched(model, before)
    factorize(model, 0.1)
    assert capsys.readouterr().out == f"{table}\n"
    factorize(lenet(), 0.1, verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ranks", [0.1, 3, gt.Tolerance(0.5), {"0.*": 2}, Loudest()], ids=repr)
def test_the_counts_are_those_of_the_models(ranks: Any) -> None:
    model = lenet()
    table = plan(model, ranks)
    before = {name: parameter_count(module) for name, module in model.named_modules()}
    factorize(model, ranks, verbose=False)
    assert table.before == before[""]
    assert table.after == parameter_count(model)
    for row in table.layers:
        layer = model.get_submodule(row.name)
        assert row.before == before[row.name]
        assert row.after == parameter_count(layer)
        assert row.ranks == getattr(layer, "ranks", None)
        assert row.shape == (layer.shape if row.ranks else tuple(layer.weight.shape))
        assert bool(row.reason) == (row.ranks is None)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_model_without_layers_has_an_empty_table() -> None:
    text = str(plan(nn.ReLU()))
    assert "0 of 0 layers" in text
    assert densify(nn.Sequential())(3) == 3


# Failures


def broken() -> nn.Sequential:
    """Build a model whose last layer cannot be decomposed."""
    model = lenet()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.inf
    return model


@pytest.mark.parametrize("ranks", [0.2, gt.Tolerance(0.5), Loudest()], ids=repr)
def test_nothing_changes_if_a_layer_fails(ranks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = broken()
    before = snapshot(model)
    with pytest.raises(gt.NonFiniteError, match=r"layer '4': .*NaN or infinity"):
        factorize(model, ranks)
    assert_untouched(model, before)
    assert tucker_names(model) == []
    assert capsys.readouterr().out == ""


def test_ranks_that_do_not_fit_a_layer_name_it() -> None:
    model = lenet()
    with pytest.raises(gt.RankError, match=r"layer '2': ranks: expected 2 positive integers"):
        factorize(model, (2, 2, 2, 2), verbose=False)
    assert tucker_names(model) == []


@pytest.mark.parametrize("function", [plan, factorize, densify])
def test_only_modules(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        function([nn.Linear(9, 9)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranks": 0}, gt.RankError, "ranks: expected a positive integer"),
        ({"ranks": {"0.*": 2, "2": -1}}, gt.RankError, "ranks: .*got -1"),
        ({"ranks": {3: 2}}, TypeError, r"ranks: expected patterns \(str\) as keys, got 3"),
        ({"ranks": "all"}, gt.RankError, "ranks: .*got 'all'"),
        ({"types": [nn.Linear, nn.Bilinear]}, TypeError, "types: expected some of nn.Linear, "),
        ({"types": "Linear"}, TypeError, "types: .*got 'L'"),
        ({"include": 3}, TypeError, "include: expected a pattern, .*got 3"),
        ({"exclude": [nn.Linear]}, TypeError, "exclude: expected a pattern"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = lenet()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        factorize(model, **options)
    assert_untouched(model, before)


def test_untrained_weights_are_scaled_up_and_others_are_not() -> None:
    torch.manual_seed(0)
    noise = nn.Linear(400, 120)
    trained = nn.Linear(400, 120)
    with torch.no_grad():
        trained.weight.addr_(torch.randn(120), torch.randn(400), alpha=0.1)
    for layer, scaled in ((noise, True), (trained, False)):
        nearest = gt.to_dense(gt.hosvd(layer.weight.detach(), 8))
        weight = factorize(copy.deepcopy(layer), 8, verbose=False).dense_weight().detach()
        torch.testing.assert_close(weight / weight.norm(), nearest / nearest.norm())
        lost = layer.weight.norm() / nearest.norm()
        power = 0.75 if scaled else 0.0
        torch.testing.assert_close(weight.norm() / nearest.norm(), lost.detach() ** power)
    for model, rescale in ((noise, False), (trained, True)):
        weight = factorize(copy.deepcopy(model), 8, rescale=rescale, verbose=False).dense_weight()
        nearest = gt.to_dense(gt.hosvd(model.weight.detach(), 8))
        assert (weight.norm() > 1.01 * nearest.norm()) == rescale


FRESH: dict[str, Any] = {
    "linear": lambda: nn.Linear(64, 10),
    "square": lambda: nn.Linear(48, 48),
    "convolution": lambda: nn.Conv2d(3, 16, 3),
    "groups": lambda: nn.Conv2d(16, 32, 3, groups=8),
    "one dimension": lambda: nn.Conv1d(12, 20, 5),
    "three dimensions": lambda: nn.Conv3d(4, 6, 3),
    "transposed": lambda: nn.ConvTranspose2d(16, 8, 3),
    "embedding": lambda: nn.Embedding(30, 8),
    "wide embedding with padding": lambda: nn.Embedding(4, 64, padding_idx=0),
}
INITS: dict[str, Any] = {
    "its own": lambda weight: weight,
    "uniform": lambda weight: nn.init.uniform_(weight, -1.0, 1.0),
    "normal": nn.init.normal_,
    "truncated": nn.init.trunc_normal_,
    "Xavier": nn.init.xavier_uniform_,
    "He": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
}


def is_scaled(layer: Any) -> bool:
    """Tell whether `factorize` scales a layer up that it truncates to rank 2."""
    ours, nearest = (
        factorize(copy.deepcopy(layer), 2, rescale=rescale, verbose=False).core.norm()
        for rescale in (None, False)
    )
    return bool(ours > 1.01 * nearest)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("kind", FRESH)
def test_fresh_layers_of_all_kinds_are_scaled_up(kind: str, init: str) -> None:
    torch.manual_seed(0)
    for _ in range(5):
        layer = FRESH[kind]()
        with torch.no_grad():
            INITS[init](layer.weight)
            if kind.endswith("padding"):
                layer.weight[0] = 0.0
        assert is_scaled(layer)


@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("change", [0.0, 2.0])
def test_a_slice_that_stands_out_in_any_mode_says_trained(mode: int, change: float) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 32, 3)
    assert is_scaled(layer)
    with torch.no_grad():
        layer.weight.select(mode, 1).mul_(change)
        if mode == 0 and change == 0.0:  # rows of zeros say nothing, two that are equal do
            layer.weight.select(mode, 1).copy_(layer.weight.select(mode, 2))
    assert not is_scaled(layer)


@pytest.mark.parametrize("pattern", [None, "*"])
def test_a_schedule_chooses_layers_by_its_end_and_ranks_by_its_start(pattern: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def size() -> int:  # of what the budget is for: in a mapping of weights alone
        return sum(p.numel() for p in model.parameters() if pattern is None or p.ndim > 1)

    dense = size()
    first = gt.Budget(parameters=0.9)  # at which the last layer gains nothing
    assert isinstance(factorize(copy.deepcopy(model), first, verbose=False)[2], nn.Linear)
    budget = gt.Budget(parameters=0.1, start=0.9, steps=4)
    rule = budget if pattern is None else {pattern: budget}
    factorize(model, rule, verbose=False)
    assert isinstance(model[2], TuckerLinear)
    assert 0.88 <= size() / dense <= 0.9
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1), model, rule, basis_every=1)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(32, 64)).square().mean().backward()
        optimizer.step()
    assert 0.08 <= size() / dense <= 0.1  # in ranks


def test_a_budget_in_a_mapping_is_for_its_layers_be_they_replaced_or_not() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 10, bias=False))
    table = plan(model, {"*": gt.Budget(parameters=0.9)})
    assert [row.ranks is None for row in table.layers] == [False, True]
    assert 0.86 * table.before <= table.after <= 0.9 * table.before
    schedule = gt.Budget(parameters=0.8, start=0.9, steps=3)
    begun = plan(model, {"0": schedule, "1": gt.Budget(parameters=0.2)})
    first, second = (row.after / row.before for row in begun.layers)
    assert 0.88 <= first <= 0.9 and 0.1 < second <= 0.2


def test_a_budget_is_one_for_the_whole_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.BatchNorm2d(20), nn.Conv2d(20, 50, 5), nn.Flatten(),
        nn.Linear(800, 500), nn.Linear(500, 10),
    )  # fmt: skip
    dense = sum(p.numel() for p in model.parameters())
    for share in (0.3, 0.05, 0.02):
        table = plan(model, gt.Budget(parameters=share))
        assert 0.99 * share <= table.after / dense <= share
        table = plan(model, gt.Budget(bytes=share))
        assert 0.99 * share <= table.after / dense <= share
    assert plan(model, gt.Budget(parameters=20_000)).after <= 20_000
    assert sum(p.numel() for p in model.parameters()) == dense
    factorize(model, gt.Budget(parameters=0.05), verbose=False)
    assert 0.99 * 0.05 <= sum(p.numel() for p in model.parameters()) / dense <= 0.05
    with pytest.raises(gt.RankError, match=r"parameters: expected more than 10 .* got 10"):
        plan(nn.Sequential(nn.Linear(20, 10)), gt.Budget(parameters=10))
    with pytest.raises(gt.RankError, match=r"parameters: expected at least 31 .* got 20"):
        plan(nn.Sequential(nn.Linear(20, 10)), gt.Budget(parameters=30))
    with pytest.raises(gt.RankError, match="flops"):
        plan(nn.Sequential(nn.Linear(9, 9)), gt.Budget(flops=0.5))
