"""Models for inference: every chain computes the same, and the fastest one is taken."""

import copy
import io
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import geotucker as gt
from geotucker_torch import (
    TDLRT,
    TuckerConv1d,
    TuckerConv2d,
    TuckerLinear,
    TuckerModule,
    _inference,
    factorize,
    optimize_for_inference,
)
from geotucker_torch._inference import candidates, measure
from geotucker_torch._modules import has_hooks

from .cases import DOUBLE, close, convolutions, embeddings, image, linears, network, transposed

NAMES = ["dense", "project-kernel-spread", "kernel-spread", "project-kernel"]


def optimized(model: nn.Module, example: Any, **options: Any) -> nn.Module:
    return optimize_for_inference(model, example, repeats=1, **{"verbose": False, **options})


def tucker_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, TuckerModule)]


def prefer(monkeypatch: pytest.MonkeyPatch, *wanted: str) -> None:
    """Let the first candidate or model of these names win, whatever it takes."""

    def fastest(seconds: Any, sizes: Any) -> str:
        return next(name for name in wanted if name in seconds)

    monkeypatch.setattr(_inference, "_fastest", fastest)


# The chains


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(st.one_of(linears(), convolutions(), embeddings(), transposed()))
def test_every_candidate_computes_the_same(case: tuple[TuckerModule, Tensor]) -> None:
    layer, x = case
    modules = candidates(layer)
    assert list(modules) == NAMES
    for module in modules.values():
        close(module(x), layer(x))
        if isinstance(layer, TuckerConv2d) and x.dim() == 4:
            images = x.contiguous(memory_format=torch.channels_last)
            close(module.to(memory_format=torch.channels_last)(images), layer(x))


def test_candidates_with_different_ranks_of_a_matrix() -> None:
    layer, x = TuckerLinear(6, 5, ranks=3, **DOUBLE), torch.randn(4, 6, **DOUBLE)
    factors = [torch.randn(5, 2, **DOUBLE), torch.randn(6, 3, **DOUBLE)]
    with torch.no_grad():
        layer.core.set_(torch.randn(2, 3, **DOUBLE))
        for factor, new in zip(layer.factors, factors, strict=True):
            factor.set_(new)
    for module in candidates(layer).values():
        close(module(x), layer(x))


def test_candidates_share_nothing_with_the_layer() -> None:
    layer = TuckerConv2d(4, 6, 3, ranks=2)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    for module in candidates(layer).values():
        assert not module.training
        for parameter in module.parameters():
            assert parameter.untyped_storage().data_ptr() not in own
            assert not parameter.requires_grad
            assert parameter.is_contiguous()


def test_a_pointwise_kernel_skips_before_the_projection() -> None:
    layer = TuckerConv2d(8, 8, 1, ranks=2, stride=(2, 3))
    project, kernel, _ = candidates(layer)["project-kernel-spread"]  # type: ignore[misc]
    assert (project.stride, kernel.stride) == ((2, 3), (1, 1))
    kernel, _ = candidates(layer)["kernel-spread"]  # type: ignore[misc]
    assert kernel.stride == (2, 3)


def test_half_precision_is_folded_in_single() -> None:
    layer = TuckerLinear(64, 64, ranks=16)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    for module in candidates(half).values():
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        x = torch.randn(3, 64)
        torch.testing.assert_close(module(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.05)


# Whole models


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", ["", ", channels last"])
def test_whole_models_with_every_candidate(
    name: str, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network(), image()
    whole = ("dense" if name == "dense" else "factored") + images
    prefer(monkeypatch, whole, name)
    plain = optimized(model, x)
    close(plain(x), model.eval()(x))
    expected = nn.Conv2d if name == "dense" else nn.Sequential
    assert {type(plain[i]) for i in (3, 4)} == {expected}
    assert not any("geotucker" in type(module).__module__ for module in plain.modules())
    for part in (plain[0], plain[4]):
        kernel = next(p for p in part.parameters() if p.dim() == 4 and p[0, 0].numel() > 1)
        assert kernel.is_contiguous(memory_format=torch.channels_last) == bool(images)


def test_the_model_is_untouched() -> None:
    model = network()
    before, state = copy.deepcopy(model), torch.random.get_rng_state()
    objects = [id(x) for x in (*model.modules(), *model.parameters())]
    optimized(model, example := torch.ones(2, 3, 8, 8, **DOUBLE))
    assert torch.equal(example, torch.ones_like(example))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [id(x) for x in (*model.modules(), *model.parameters())] == objects
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    flags = [[p.requires_grad for p in m.parameters()] for m in (model, before)]
    assert flags[0] == flags[1]


def test_the_result_is_for_inference() -> None:
    model = network()
    plain = optimized(model, image())
    assert not any(module.training for module in plain.modules())
    assert not any(p.requires_grad for p in plain.parameters())
    for module in plain.modules():
        assert not has_hooks(module)
    for name, buffer in model[1].named_buffers():
        assert torch.equal(buffer, plain[1].get_buffer(name))


def test_what_a_model_draws_or_counts_in_a_run_stays_out() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = TuckerLinear(9, 9, ranks=2)
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            x.mul_(2)
            return self.layer(x + torch.randn(9))

    model, x = Counting(), torch.ones(9)
    state = torch.random.get_rng_state()
    assert optimized(model, x).runs == model.runs == 0
    assert torch.equal(x, torch.ones(9))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_traced_and_pickled_without_this_package() -> None:
    model, x = network(), image()
    plain = optimized(model, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.*` is (deprecated|not supported)")
        traced = torch.jit.trace(plain, x)
    close(traced(x), model.eval()(x))
    exported = torch.export.export(plain, (x,)).module()
    close(exported(x), model(x))
    buffer = io.BytesIO()
    torch.save((plain, x, model(x)), buffer)
    code = """
import io, sys
sys.modules.update(dict.fromkeys(["geotucker", "geotucker_torch", "tensorly"]))
import torch
model, x, y = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)
assert (model(x) - y).abs().max() < 1e-12
"""
    subprocess.run([sys.executable, "-c", code], input=buffer.getvalue(), check=True, timeout=120)


def test_a_shared_layer_becomes_one_shared_module() -> None:
    layer = TuckerLinear(6, 6, ranks=2, **DOUBLE)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = layer, nn.Sequential(layer, nn.ReLU(), layer)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x[0]) + x)

    plain, x = optimized(Twice(), torch.randn(2, 6, **DOUBLE)), torch.randn(2, 6, **DOUBLE)
    assert plain.a is plain.b[0] is plain.b[2]
    assert type(plain.a) in (nn.Linear, nn.Sequential)
    close(plain(x), Twice()(x))


def test_the_root_itself() -> None:
    layer = TuckerConv1d(4, 4, 3, ranks=2, **DOUBLE)
    x = torch.randn(2, 4, 9, **DOUBLE)
    plain = optimized(layer, x)
    assert not isinstance(plain, TuckerModule)
    close(plain(x), layer(x))


def test_arguments() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rnn = TuckerLinear(4, 4, ranks=1), nn.RNN(3, 4)

        def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
            if isinstance(x, nn.utils.rnn.PackedSequence):
                x = self.rnn(x)[1][0]
            return self.layer(x if y is None else x + y)

    x = torch.randn(2, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    for example in (x, (x,), (x, x), {"x": x}, {"y": x, "x": x}, packed):
        assert tucker_names(optimized(Model(), example)) == []


def test_views_that_need_contiguous_images() -> None:
    class Viewing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(x.shape[0], -1)

    model, x = Viewing(TuckerConv2d(3, 8, 3, ranks=2, **DOUBLE)), image()
    close(optimized(model, x)(x), model(x))


def test_bases_lifted_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = factorize(nn.Sequential(nn.Linear(9, 8, **DOUBLE)), 2, verbose=False)
    optimizer = TDLRT(torch.optim.SGD(model.parameters(), 0.1), model)
    x = torch.randn(4, 9, **DOUBLE)
    model(x).sum().backward()
    ranks = model[0].ranks
    prefer(monkeypatch, "project-kernel", "factored")
    plain = optimized(model, x)
    assert model[0].ranks == ranks != (2, 2)
    assert plain[0][0].out_features == 2
    close(plain(x), model(x))
    optimizer.step()


# What stays, and what becomes dense


def report(model: nn.Module, example: Any, capsys: pytest.CaptureFixture[str]) -> list[str]:
    optimized(model, example, verbose=True)
    return capsys.readouterr().out.splitlines()


def test_models_without_tucker_layers(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    plain = optimized(model, None)
    assert plain is not model
    assert not plain.training
    assert repr(plain) == repr(model)
    assert "as it is" in report(model, None, capsys)[-1]


def test_a_layer_that_the_example_does_not_reach(capsys: pytest.CaptureFixture[str]) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = TuckerLinear(4, 4, 1), TuckerLinear(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Half()
    assert tucker_names(optimized(model, torch.ones(4))) == ["unused"]
    assert report(model, torch.ones(4), capsys)[3].endswith(
        "as it is: the example does not reach it"
    )


def test_layers_that_a_module_would_not_replace(capsys: pytest.CaptureFixture[str]) -> None:
    class Scaled(TuckerLinear):
        """More than its base."""

    model = nn.Sequential(TuckerLinear(4, 4, 1), Scaled(4, 4, 1), TuckerLinear(4, 4, 1))
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    assert tucker_names(optimized(model, torch.ones(4))) == ["0", "1"]
    lines = report(model, torch.ones(4), capsys)
    assert lines[2].endswith("as it is: it has hooks, which a new layer would lack")
    assert "subclass" in lines[3]


def test_an_owner_that_reads_the_weight_gets_a_dense_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = TuckerLinear(50, 50, 1, **DOUBLE)
            self.other = TuckerLinear(50, 50, 1, **DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.layer(x.to(self.layer.weight.dtype)))

    prefer(monkeypatch, "project-kernel", "factored")
    model, x = Reader(), torch.randn(3, 50, **DOUBLE)
    plain = optimized(model, x)
    assert type(plain.layer) is nn.Linear
    assert type(plain.other) is nn.Sequential
    close(plain(x), model(x))


@pytest.mark.parametrize("batched", [True, False])
def test_encoders_of_pytorch(batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, "project-kernel", "factored", "dense")
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
    model = factorize(nn.TransformerEncoder(block, 2), 2, verbose=False).eval()
    x = torch.randn(2, 5, 16, **DOUBLE)
    plain = optimized(model, x if batched else x[0])
    assert tucker_names(plain) == []
    close(plain(x), model(x))  # the fast path, which reads weights, or not
    close(plain(x[0]), model(x[0]))


def test_errors_are_the_models_own() -> None:
    model = nn.Sequential(TuckerConv2d(3, 4, 3, ranks=2))
    with pytest.raises(gt.ShapeError, match=r"x: expected shape \(batch, 3, n_1, n_2\)"):
        optimized(model, torch.ones(2, 4, 8, 8))
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        optimized(model, {"y": 1})
    assert tucker_names(model) == ["0"]


@pytest.mark.parametrize("repeats", [0, True, 2.0])
def test_bad_arguments(repeats: Any) -> None:
    with pytest.raises(ValueError, match="repeats: expected a positive integer"):
        optimize_for_inference(network(), image(), repeats=repeats)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        optimize_for_inference([network()], image())  # type: ignore[arg-type]


# The choice


def fake_clock(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Let what is named take a time of its own, and all else one second."""

    def pretend(functions: Any, repeats: int) -> dict[str, float]:
        names = {name: name.replace("-", "_").replace(", ", "_") for name in functions}
        return {name: seconds.get(key.replace(" ", "_"), 1.0) for name, key in names.items()}

    monkeypatch.setattr(_inference, "measure", pretend)


def test_the_fastest_is_taken_and_a_tie_goes_to_the_smallest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = nn.Sequential(TuckerLinear(50, 50, 2)), torch.ones(50)
    fake_clock(monkeypatch, project_kernel=0.5)
    linear = optimized(model, x)[0]
    assert [type(m) for m in linear] == [nn.Linear, nn.Linear]
    assert linear[0].bias is None
    fake_clock(monkeypatch, dense=0.98)
    assert isinstance(optimized(model, x)[0], nn.Sequential)
    fake_clock(monkeypatch, dense=0.96)
    assert isinstance(optimized(model, x)[0], nn.Linear)


def test_a_model_that_is_slower_as_a_whole_is_dense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_clock(monkeypatch, kernel_spread=0.1, factored=1.1, factored_channels_last=1.1)
    model, x = nn.Sequential(TuckerConv2d(8, 8, 3, 2)), torch.ones(1, 8, 5, 5)
    assert isinstance(optimized(model, x)[0], nn.Conv2d)
    fake_clock(monkeypatch, kernel_spread=0.1, factored_channels_last=0.5)
    assert report(model, x, capsys) == [
        "layer        type    shape         ranks         dense ms  factored ms  chosen",
        "-" * 95,
        "0            Conv2d  (8, 8, 3, 3)  (2, 2, 2, 2)  1000.000      100.000  kernel-spread",
        "-" * 95,
        "whole model                                      1000.000      500.000  "
        "factored, channels last",
    ]


def test_inputs_of_one_kind_are_timed_once_and_count_as_often_as_they_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = TuckerLinear(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = self.layer(x)
            return self.layer(x[0])

    timed = []

    def pretend(functions: Any, repeats: int) -> dict[str, float]:
        timed.append(list(functions))
        return dict.fromkeys(functions, 1.0)

    monkeypatch.setattr(_inference, "measure", pretend)
    _, found = _inference._optimised(Recurrent().eval(), ((torch.ones(2, 4),), {}), 1)
    assert timed == [NAMES, NAMES, ["dense", "factored"]]
    assert found.layers[0].seconds == dict.fromkeys(NAMES, 6.0)


def test_times_are_the_shortest_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = {"a": iter([9, 3, 1, 2]), "b": iter([9, 6, 5, 4])}
    monkeypatch.setattr(_inference, "_seconds", lambda call, n: 1e-6 * n * next(turns[call()]))
    seconds = measure({"a": lambda: "a", "b": lambda: "b"}, 3)
    assert seconds == pytest.approx({"a": 1e-6, "b": 4e-6})


def test_the_clock_reads_all_calls() -> None:
    calls: list[int] = []
    assert 0 < _inference._seconds(lambda: calls.append(1), 100) < 0.1
    assert len(calls) == 100
