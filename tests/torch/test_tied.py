"""Tied weights: one core and one set of bases, whatever uses them."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import geotucker as gt
from geotucker.testing import check_orthonormal
from geotucker_torch import (
    TDLRT,
    TuckerConv1d,
    TuckerEmbedding,
    TuckerLinear,
    TuckerModule,
    TuckerTensorLinear,
    densify,
    factorize,
    finalize,
    load_checkpoint,
    load_weights,
    plan,
    save_checkpoint,
)
from geotucker_torch._rules import flops_of
from geotucker_torch._slots import find_slots

from .cases import sgd, trained

DOUBLE = {"dtype": torch.float64}


class Words(nn.Module):
    """Predicts words from words, by one table for both."""

    def __init__(self, number: int = 20, size: int = 12, scale: float = 0.3) -> None:
        super().__init__()
        self.embed = nn.Embedding(number, size, **DOUBLE)
        self.inner = nn.Linear(size, size, **DOUBLE)
        self.head = nn.Linear(size, number, **DOUBLE)
        with torch.no_grad():
            self.embed.weight.mul_(scale)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(x))))


class Pictures(nn.Module):
    """An encoder of images and its adjoint."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 10, 3, stride=2, **DOUBLE)
        self.up = nn.ConvTranspose2d(10, 3, 3, stride=2, **DOUBLE)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(x)))


class Twins(nn.Module):
    """Two linear layers with one weight, one of them used twice."""

    def __init__(self, size: int = 9) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(size, size, **DOUBLE) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


CASES = {
    "words": (Words, lambda: torch.randint(20, (4, 6))),
    "pictures": (Pictures, lambda: torch.randn(2, 3, 7, 7, **DOUBLE)),
    "twins": (Twins, lambda: torch.randn(5, 9, **DOUBLE)),
    "tensors": (lambda: Twins(16), lambda: torch.randn(5, 16, **DOUBLE)),
}
OPTIONS: dict[str, dict[str, Any]] = {"tensors": {"tensorise": 2}}
every_case = pytest.mark.parametrize("case", CASES)


def tucker_layers(model: nn.Module) -> list[TuckerModule]:
    return [module for module in model.modules() if isinstance(module, TuckerModule)]


def tied(model: nn.Module) -> list[Any]:
    """Return the tied Tucker layers of one of the models."""
    return [m for m in tucker_layers(model) if m is not getattr(model, "inner", None)]


def assert_tied(model: nn.Module) -> None:
    first, second = tied(model)
    assert first is not second
    assert first.core is second.core
    assert all(a is b for a, b in zip(first.factors, second.factors, strict=True))


def build(case: str, ranks: Any = 2, **options: Any) -> tuple[Any, Any, Tensor]:
    """Return a factorised model, the same in dense form, and an input."""
    torch.manual_seed(0)
    kind, inputs = CASES[case]
    model = factorize(kind(), ranks, verbose=False, **OPTIONS.get(case, {}), **options)
    return model, densify(copy.deepcopy(model)), inputs()


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y - 1).square().mean() + (y**3).mean() / 10


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# factorize and back


@every_case
def test_factorize_keeps_ties_and_densify_does(case: str) -> None:
    torch.manual_seed(0)
    kind, inputs = CASES[case]
    model, x = kind(), inputs()
    options = OPTIONS.get(case, {})
    exact = factorize(copy.deepcopy(model), {"*inner*": 12, "*": 100}, verbose=False, **options)
    assert not tucker_layers(exact)  # it would grow
    model = factorize(model, 2, verbose=False, **options)
    assert_tied(model)
    expected, names = model(x), list(model.state_dict())
    assert (
        len(list(model.parameters()))
        == len(names)
        - len(model.get_parameter(next(n for n in names if n.endswith("core"))).shape)
        - 1
    )
    dense = densify(copy.deepcopy(model))
    assert not tucker_layers(dense)
    first, second = [m.weight for m in dense.children() if m is not getattr(dense, "inner", None)]
    assert first is second
    close(dense(x), expected)


def test_one_row_and_one_count() -> None:
    summary = plan(Words(), 3)
    row, inner = summary.layers
    assert row.names == ("embed", "head")
    assert (row.type, row.shape, row.ranks) == ("Embedding = Linear", (20, 12), (3, 3))
    assert (row.before, row.after) == (20 * 12 + 20, 3 * (20 + 12 + 3) + 20)
    model = Words()
    assert summary.before == sum(p.numel() for p in model.parameters())
    factorize(model, 3, verbose=False)
    assert summary.after == sum(p.numel() for p in model.parameters())
    assert inner.names == ("inner",)


def test_a_tie_is_chosen_as_a_whole_or_not_at_all() -> None:
    for options in ({"exclude": "head"}, {"include": "inner"}, {"types": nn.Linear}):
        model = factorize(Words(), 2, verbose=False, **options)
        assert model.head.weight is model.embed.weight
    model = factorize(Words(), 2, include="head", verbose=False)
    assert_tied(model)
    model = Words()
    model.embed.max_norm = 1.0
    assert "max_norm" in plan(model, 2).layers[0].reason
    model = Words()
    model.copy = model.embed.weight
    assert "tied" in plan(model, 2).layers[0].reason
    factorize(model, 2, verbose=False)
    assert model.copy is model.head.weight


@pytest.mark.parametrize("rule", [gt.Tolerance(0.8), gt.Budget(parameters=0.6), {"head": 2}])
def test_every_rule(rule: Any) -> None:
    model = factorize(Words(30, 24), rule, verbose=False)
    assert_tied(model)
    if isinstance(rule, gt.Budget):
        size = sum(p.numel() for p in model.parameters())
        assert size <= 0.6 * sum(p.numel() for p in Words(30, 24).parameters())


def test_embeddings_and_linear_layers_are_reshaped_together() -> None:
    model = factorize(Words(), 2, tensorise=2, verbose=False)
    assert_tied(model)
    assert model.head.shape == model.embed.shape == (4, 5, 3, 4)
    assert model.inner.shape == (3, 4, 3, 4)


def test_the_price_of_reshaped_layers_counts_every_use() -> None:
    model, _, x = build("tensors")
    optimizer = TDLRT(sgd(model), model)
    loss_of(model, x).backward()
    optimizer.zero_grad()
    cost = flops_of(find_slots(model)[0])
    assert cost.dense == 2 * len(x) * 16 * 16
    assert cost.tucker((1,) * 4) < cost.tucker((2,) * 4) < cost.dense


@pytest.mark.parametrize("listed", [False, True])
def test_ties_are_declared_as_transformers_asks_for(listed: bool) -> None:
    dense: Any = {"head.weight": "embed.weight"}
    core: Any = {f"head.{name}": f"embed.{name}" for name in ("core", "factors.0", "factors.1")}
    if listed:
        dense, core = list(dense), list(core)

    class Declared(Words):
        _tied_weights_keys = dense

    outer = factorize(nn.Sequential(Declared()), 2, verbose=False)
    assert outer[0]._tied_weights_keys == core
    assert densify(outer)[0]._tied_weights_keys == dense
    left = factorize(Declared(), 2, exclude="head", verbose=False)
    assert left._tied_weights_keys == Declared._tied_weights_keys == dense
    apart = Declared()
    apart.head.weight = nn.Parameter(apart.head.weight.detach().clone())
    assert factorize(apart, 2, verbose=False)._tied_weights_keys == dense


def test_models_without_values() -> None:
    with torch.device("meta"):
        model = factorize(Words(), 2, verbose=False)
    assert_tied(model)
    assert model.head.core.is_meta


# Training


@every_case
@pytest.mark.parametrize("integrator", ["tangent", "tdlrt"])
def test_gradients_of_all_uses_reach_the_core_and_the_bases(case: str, integrator: str) -> None:
    model, dense, x = build(case)
    optimizer = TDLRT(sgd(model), model, integrator=integrator)
    layer = tied(model)[0]
    point = layer.point
    loss_of(model, x).backward()
    loss_of(dense, x).backward()
    gradient = whole = next(m for m in dense.children()).weight.grad.reshape(layer.shape)
    wide = layer.point
    assert all(2 < r <= 4 for r, n in zip(wide.ranks, wide.shape, strict=True) if n > 3)
    if integrator == "tangent":
        tangent = gt.project(point, gradient)
        expected = gt.to_dense(gt.tangent_to_point(point, tangent))
    else:
        for factor in wide.factors:
            gradient = torch.tensordot(gradient, factor, ([0], [0]))
        expected = gt.to_dense((gradient, wide.factors))
        # The bases hold the directions of the whole gradient.
        tangent = gt.project(point, whole)
        for direction, factor in zip(tangent.factors, wide.factors, strict=True):
            close(factor @ (factor.T @ direction), direction, 1e-11)
    close(gt.to_dense((layer.core.grad, wide.factors)), expected, 1e-11)
    optimizer.step()
    assert_tied(model)
    check_orthonormal(layer.point)


@given(
    case=st.sampled_from(sorted(CASES)),
    ranks=st.integers(1, 3),
    rule=st.sampled_from([None, gt.Tolerance(0.1), gt.Budget(parameters=0.9)]),
)
def test_one_pass_is_two(case: str, ranks: int, rule: Any) -> None:
    model, _, x = build(case, ranks)
    one, two = (
        trained(model, x, loss_of=loss_of, one_pass=flag, rule=rule) for flag in (True, False)
    )
    for a, b in zip(tucker_layers(one), tucker_layers(two), strict=True):
        assert a.ranks == b.ranks
        close(a.dense_weight(), b.dense_weight())
        if a.bias is not None:
            close(a.bias, b.bias)
    assert_tied(one)


@pytest.mark.parametrize("integrator", ["tangent", "tdlrt"])
def test_micro_batches_and_a_kept_graph(integrator: str) -> None:
    model, _, x = build("words")
    optimizer = TDLRT(sgd(model), model, integrator=integrator)
    assert optimizer.ranks["embed"] == (2, 2)
    loss = loss_of(model, x)
    loss.backward(retain_graph=True)
    assert optimizer.ranks["embed"] == (4, 4)
    once = model.head.core.grad.clone()
    loss.backward()
    close(model.head.core.grad, 2 * once)
    loss_of(model, x).backward()  # in the wide bases
    close(model.head.core.grad, 3 * once)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    gradients = []
    for saves in (False, True):
        model, _, x = build("twins")
        x.requires_grad_(reentrant)
        optimizer = TDLRT(sgd(model), model)
        y = checkpoint(model, x, use_reentrant=reentrant) if saves else model(x)
        (y - 1).square().mean().backward()
        assert optimizer.ranks["a"] == (4, 4)
        layer = model.a
        gradients.append(gt.to_dense((layer.core.grad, [u.detach() for u in layer.factors])))
    close(*gradients)


def test_reentrant_checkpoints_of_one_weight_are_micro_batches() -> None:
    model, dense, x = build("twins")
    optimizer = TDLRT(sgd(model), model, integrator="tdlrt")
    outer = model.a(x.requires_grad_())
    inner = checkpoint(lambda y: model.b(torch.tanh(model.a(y))), outer, use_reentrant=True)
    model.b(inner).square().sum().backward()
    middle = dense.b(torch.tanh(dense.a(dense.a(x))))
    dense.b(middle).square().sum().backward()
    gradient = dense.a.weight.grad
    for factor in model.a.factors:
        gradient = torch.tensordot(gradient, factor.detach(), ([0], [0]))
    close(model.a.core.grad, gradient, 1e-10)
    optimizer.step()


def test_a_backward_pass_that_fails_leaves_nothing_behind() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    gradients = []
    for fails in (True, False):
        model, _, x = build("twins")
        optimizer = TDLRT(sgd(model), model)
        if fails:
            with pytest.raises(RuntimeError, match="on purpose"):
                model.b(Fails.apply(model.a(x))).sum().backward()
            assert optimizer.ranks["a"] == (2, 2)
        loss_of(model, x).backward()
        gradients.append(model.a.core.grad)
        optimizer.step()
        assert model.a._lift.waiting == {}
    close(*gradients)


@pytest.mark.parametrize("integrator", ["tangent", "tdlrt"])
def test_a_gradient_that_is_not_finite_lifts_nothing(integrator: str) -> None:
    model, _, x = build("words")
    optimizer = TDLRT(sgd(model), model, integrator=integrator)
    (loss_of(model, x) * float("nan")).backward()
    assert optimizer.ranks["embed"] == (2, 2)
    assert model.head.core.grad.isnan().any()
    with pytest.raises(gt.NonFiniteError, match="embed"):
        optimizer.step()
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()
    assert_tied(model)


def test_zero_grad_and_copies_amid_a_step() -> None:
    model, _, x = build("words")
    optimizer = TDLRT(sgd(model), model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss_of(model, x).backward()
    assert model.head.ranks == (4, 4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    twin = copy.deepcopy(model)
    assert_tied(twin)
    twin.embed.unlift()  # a copy is anybody's to write into: nothing is taken back
    assert twin.head.ranks == (4, 4)
    assert torch.equal(twin.head.dense_weight(), model.head.dense_weight())
    optimizer.zero_grad()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_operations_of_all_uses_count() -> None:
    model, _, x = build("words")
    optimizer = TDLRT(sgd(model), model, gt.Budget(flops=0.9))
    loss_of(model, x).backward()
    optimizer.zero_grad()
    price = flops_of(find_slots(model)[0])
    rows = x.numel()
    assert price.dense == rows * 12 * 20  # the lookup is free
    linear = rows * 12 * 2 + rows * 2 * 20 + 12 * 2 * 2  # with C U_1^T formed
    assert price.tucker((2, 2)) == linear + rows * 12 * 2 + 12 * 2 * 2
    loss_of(model, x).backward()
    optimizer.step()
    assert_tied(model)


# By hand


def test_layers_tied_by_hand_train_as_one() -> None:
    expected, _, x = build("words")
    for by_method in (True, False):
        model = copy.deepcopy(expected)
        head = TuckerLinear(12, 20, 4, **DOUBLE)
        if by_method:
            head.tie(model.embed)
        else:
            head.core, head.factors = model.embed.core, model.embed.factors
        head.bias = model.head.bias
        model.head = head
        one, two = (
            trained(m, x, loss_of=loss_of, one_pass=True, rule=3) for m in (expected, model)
        )
        assert_tied(two)
        close(one.head.dense_weight(), two.head.dense_weight())


@pytest.mark.parametrize("integrator", ["tangent", "tdlrt"])
def test_layers_of_two_kinds_with_one_tensor(integrator: str) -> None:
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = TuckerConv1d(6, 5, 4, 2, **DOUBLE)
            self.linear = TuckerTensorLinear((4,), (5, 6), 2, **DOUBLE)
            self.linear.tie(self.conv)

        def forward(self, x: Tensor) -> Tensor:  # shape: (batch, 6, 4)
            return self.conv(x)[..., 0].sum() + self.linear(x).square().mean()

    model, x = Both(), torch.randn(3, 6, 4, **DOUBLE)
    dense = densify(copy.deepcopy(model))
    optimizer, point = TDLRT(sgd(model), model, integrator=integrator), model.conv.point
    model(x).backward()
    dense(x).backward()
    gradient = whole = dense.conv.weight.grad + dense.linear.weight.grad.reshape(5, 6, 4)
    wide = model.conv.point
    assert wide.ranks == (4, 4, 4)
    if integrator == "tangent":
        tangent = gt.project(point, whole)
        expected = gt.to_dense(gt.tangent_to_point(point, tangent))
    else:
        for factor in wide.factors:
            gradient = torch.tensordot(gradient, factor, ([0], [0]))
        expected = gt.to_dense((gradient, wide.factors))
    close(gt.to_dense((model.conv.core.grad, wide.factors)), expected, 1e-11)
    optimizer.step()
    check_orthonormal(model.linear.point)
    plain = finalize(model)
    close(plain(x), model(x), 1e-11)


def test_layers_that_were_untied_by_hand_are_apart() -> None:
    model, _, x = build("words")
    model.head.core = nn.Parameter(model.head.core.detach().clone())
    model.head.factors = nn.ParameterList(copy.deepcopy(list(model.head.factors)))
    optimizer = TDLRT(sgd(model), model)
    assert list(optimizer.ranks) == ["embed", "inner", "head"]
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    check_orthonormal(model.head.point)
    assert not torch.equal(model.head.dense_weight(), model.embed.dense_weight())


def test_what_cannot_be_tied() -> None:
    layer = TuckerLinear(6, 4, 2)
    core = layer.core
    with pytest.raises(TypeError, match="other: expected a Tucker layer, got Linear"):
        layer.tie(nn.Linear(6, 4))
    with pytest.raises(gt.ShapeError, match=r"other: .* of shape \(4, 6\), got \(6, 4\)"):
        layer.tie(TuckerEmbedding(6, 4, 2))
    assert layer.core is core


# States


@every_case
def test_states_and_copies_keep_ties(case: str) -> None:
    model, _, x = build(case)
    expected = model(x)
    for other in (copy.deepcopy(model), build(case, 1)[0]):
        other.load_state_dict(model.state_dict())
        assert_tied(other)
        close(other(x), expected)
        assert tied(other)[0]._lift is tied(other)[1]._lift
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_tied(torch.load(file, weights_only=False))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dense_state", [False, True])
def test_load_weights_keeps_ties(assign: bool, dense_state: bool) -> None:
    model, dense, x = build("words", 3)
    other = build("words", 1)[0]
    state = (dense if dense_state else model).state_dict()
    load_weights(other, state, ranks=3, rescale=False, assign=assign)
    assert_tied(other)
    close(other(x), model(x))
    load_weights(dense, model.state_dict())
    assert dense.head.weight is dense.embed.weight


def test_a_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def setup(ranks: int) -> tuple[Any, TDLRT, Tensor]:
        model, _, x = build("words", ranks)
        return model, TDLRT(sgd(model), model, gt.Budget(parameters=0.8, steps=4)), x

    def run(model: Any, optimizer: TDLRT, x: Tensor, number: int) -> None:
        for _ in range(number):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()

    model, optimizer, x = setup(4)
    run(model, optimizer, x, 3)
    save_checkpoint(tmp_path / "file", model, optimizer)
    run(model, optimizer, x, 3)
    resumed, its_optimizer, _ = setup(1)
    load_checkpoint(tmp_path / "file", resumed, its_optimizer)
    assert_tied(resumed)
    run(resumed, its_optimizer, x, 3)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


# finalize


@every_case
def test_finalised_models_share_what_is_the_same(case: str) -> None:
    model, _, x = build(case)
    plain = finalize(model)
    close(plain(x), model(x))
    if case == "words":
        large = [p for p in plain.parameters() if p.shape == (20, 2)]
        assert len(large) == 1
        owners = [
            name for name, p in plain.named_parameters(remove_duplicate=False) if p is large[0]
        ]
        assert [name.split(".")[0] for name in owners] == ["embed", "head"]
    if case == "tensors":
        first, second = (dict(layer.named_parameters()) for layer in (plain.a, plain.b))
        assert set(first) == set(second) > {"project_0", "spread_1", "kernel"}
        assert all((first[name] is second[name]) == (name != "bias") for name in first)
    if case == "twins":
        for name in ("project", "kernel"):
            parts = [getattr(layer, name).weight for layer in (plain.a, plain.b)]
            assert parts[0] is parts[1]
        assert plain.a.kernel.bias is not plain.b.kernel.bias
    names = ["embed", "head"] if case == "words" else [name for name, _ in model.named_children()]
    dense = finalize(model, dense=names)
    first, second = [dense.get_submodule(name).weight for name in names]
    assert first is second
    close(dense(x), model(x))


def test_tied_layers_become_dense_together() -> None:
    model, _, x = build("words")
    for name in ("embed", "head"):
        plain = finalize(model, dense=name)
        assert type(plain.embed) is nn.Embedding
        assert plain.head.weight is plain.embed.weight
        close(plain(x), model(x))


# A language model

TEXT = (
    "the cat sat on the mat and the dog sat on the log and the cat saw the dog and "
    "the dog saw the cat and so they sat and they sat and the mat was on the log "
)


class Language(nn.Module):
    """A small causal transformer with one table for words that come in and go out."""

    def __init__(self, number: int, size: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(number, size)
        self.position = nn.Embedding(length, size)
        block = nn.TransformerEncoderLayer(size, 2, 64, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(size, number, bias=False)
        nn.init.normal_(self.embed.weight, std=0.1)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        h = self.embed(x) + self.position(torch.arange(length))
        return self.head(self.blocks(h, mask, is_causal=True))


def test_a_language_model_learns_within_a_budget() -> None:
    torch.manual_seed(0)
    letters = sorted(set(TEXT))
    text = torch.tensor([letters.index(letter) for letter in TEXT])
    windows = text.unfold(0, 17, 4)
    model = Language(len(letters))
    full = sum(p.numel() for p in model.parameters())
    model = factorize(model, 0.5, verbose=False)
    assert_tied_language(model)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = TDLRT(adam, model, gt.Budget(parameters=0.6, steps=20))
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        y = model(windows[:, :-1])
        loss = F.cross_entropy(y.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert_tied_language(model)
    assert sum(p.numel() for p in model.parameters()) <= 0.6 * full
    assert losses[-1] < 1.7 < 2.6 < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(windows[:4, :-1])
        for other in (finalize(model), densify(copy.deepcopy(model))):
            torch.testing.assert_close(other(windows[:4, :-1]), expected, rtol=1e-3, atol=1e-3)


def assert_tied_language(model: Any) -> None:
    assert isinstance(model.embed, TuckerEmbedding)
    assert isinstance(model.head, TuckerLinear)
    assert model.embed.core is model.head.core
