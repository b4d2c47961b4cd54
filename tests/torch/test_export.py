"""Finalised models leave: into files, other runtimes, and processes without this package."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from geotucker_torch import (
    TuckerConv1d,
    TuckerConv2d,
    TuckerConv3d,
    TuckerLinear,
    factorize,
    finalize,
)

BATCH = torch.export.Dim("batch")
EVEN = "ignore:Using padding='same' with even kernel lengths"


class EveryKind(nn.Module):
    """Layers of every kind and option, side by side."""

    def __init__(self) -> None:
        super().__init__()
        options: list[dict[str, Any]] = [
            {"kernel_size": 3},
            {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": "reflect"},
            {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "replicate"},
            {"kernel_size": 3, "padding": 1, "groups": 2, "padding_mode": "circular"},
            {"kernel_size": 2, "padding": "same", "bias": False},
            {"kernel_size": 1, "stride": 2},
        ]
        self.linear = TuckerLinear(8, 12, ranks=2)
        self.one = nn.ModuleList(TuckerConv1d(8, 12, ranks=2, **o) for o in options)
        self.two = nn.ModuleList(TuckerConv2d(8, 12, ranks=2, **o) for o in options)
        self.three = nn.ModuleList(TuckerConv3d(8, 12, ranks=2, **o) for o in options)

    def forward(self, line: Tensor, image: Tensor, volume: Tensor) -> list[Tensor]:
        return [
            self.linear(line.mT),
            *(layer(line) for layer in self.one),
            *(layer(image) for layer in self.two),
            *(layer(volume) for layer in self.three),
        ]


def inputs(batch: int) -> tuple[Tensor, ...]:
    torch.manual_seed(batch)
    return tuple(torch.randn(batch, 8, *(5,) * order) for order in (1, 2, 3))


@pytest.fixture(scope="module")
def every_kind() -> tuple[nn.Module, nn.Module]:
    """Return a model and its finalised copy."""
    torch.manual_seed(0)
    model = EveryKind().eval()
    return model, finalize(model)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 64, 10),
    )
    return factorize(model, 4, verbose=False).eval()


@pytest.mark.filterwarnings(EVEN)
def test_torch_export_with_any_batch(every_kind: tuple[nn.Module, nn.Module]) -> None:
    model, plain = every_kind
    program = torch.export.export(plain, inputs(2), dynamic_shapes=[{0: BATCH}] * 3)
    for batch in (1, 3):
        x = inputs(batch)
        torch.testing.assert_close(program.module()(*x), model(*x))


@pytest.mark.filterwarnings(EVEN)
def test_compiled_once_for_all_batches(every_kind: tuple[nn.Module, nn.Module]) -> None:
    model, plain = every_kind
    torch.compiler.reset()
    counters.clear()
    backend = CompileCounter()
    compiled = torch.compile(plain, backend=backend, fullgraph=True, dynamic=True)
    for batch in (2, 3, 7):
        x = inputs(batch)
        torch.testing.assert_close(compiled(*x), model(*x))
    assert backend.frame_count == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_compiled_once_while_it_is_fine_tuned() -> None:
    torch.compiler.reset()
    plain, backend = finalize(network()).train(), CompileCounter()
    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(torch.ones(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert backend.frame_count == 1


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")
def test_traced(every_kind: tuple[nn.Module, nn.Module]) -> None:
    model, plain = every_kind
    traced = torch.jit.trace(plain, inputs(2), strict=False)
    x = inputs(3)
    torch.testing.assert_close(traced(*x), model(*x))


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.filterwarnings("ignore:# The axis name. batch will not be used:UserWarning")
def test_onnx_runtime_computes_the_same(
    every_kind: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, plain = every_kind
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        plain,
        inputs(2),
        path,
        dynamo=True,
        dynamic_shapes=[{0: BATCH}] * 3,
        input_names=["line", "image", "volume"],
        verbose=False,
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = inputs(batch)
        feed = {name: t.numpy() for name, t in zip(("line", "image", "volume"), x, strict=True)}
        found = [torch.from_numpy(y) for y in session.run(None, feed)]
        torch.testing.assert_close(found, list(model(*x)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")
def test_loaded_without_this_package(tmp_path: Path) -> None:
    for name, dtype in (("single", torch.float32), ("half", torch.bfloat16)):
        folder = tmp_path / name
        folder.mkdir()
        plain, x = finalize(network().to(dtype)), torch.randn(2, 3, 8, 8, dtype=dtype)
        y = plain(x)
        torch.save(plain, folder / "model.pt")
        torch.save((x, y), folder / "example.pt")
        save_file(plain.state_dict(), folder / "model.safetensors")
        torch.export.save(torch.export.export(plain, (x,)), folder / "model.pt2")
        torch.jit.save(torch.jit.trace(plain, x), folder / "traced.pt")
    code = """
import os, sys
sys.modules.update(dict.fromkeys(["geotucker", "geotucker_torch", "tensorly"]))
import torch
from safetensors.torch import load_file
for folder, dtype in (("single", torch.float32), ("half", torch.bfloat16)):
    os.chdir(folder)
    x, y = torch.load("example.pt")
    assert y.dtype == dtype
    model = torch.load("model.pt", weights_only=False)
    for module in (model, torch.export.load("model.pt2").module(), torch.jit.load("traced.pt")):
        torch.testing.assert_close(module(x), y)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.load_state_dict(load_file("model.safetensors"))
    torch.testing.assert_close(model(x), y)
    os.chdir("..")
print("the same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "the same", done.stderr


def test_the_names_in_a_state_dict() -> None:
    names = {name for name in finalize(network()).state_dict() if name[0] in "04"}
    first = {"0.kernel.weight", "0.spread.weight", "0.spread.bias"}
    assert names == first | {"4.project.weight", "4.kernel.weight", "4.kernel.bias"}
