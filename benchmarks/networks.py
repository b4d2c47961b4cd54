"""The whole networks of the benchmarks, for CIFAR-10, fresh or trained, and their optimizers."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import geotucker as gt
from geotucker_torch import TDLRT, TuckerConv2d, TuckerLinear, factorize, plan
from geotucker_torch._train._fetch import download, find
from geotucker_torch._train._models import build

_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pool
_RESNET18 = ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))

# ResNets for CIFAR-10 trained by Yerlan Idelbayev, BSD 2-Clause. Files have the start of their
# SHA-256 in the name.
_TRAINED = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models"
_SHA256 = {
    "resnet20": "12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
    "resnet32": "d509ac1820d7f25398913559d7e81a13229b1e7adc5648e3bfa5e22dc137f850",
}


def vgg16(width: float = 1.0) -> nn.Module:
    """VGG16 with batch normalisation and a head of 512, 512 and 10 units, times `width`."""
    layers: list[nn.Module] = []
    channels = 3
    for size in _VGG16:
        if size == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += _normalised(channels, int(size * width), 3, 1)
        layers.append(nn.ReLU(inplace=True))
        channels = int(size * width)
    head = [nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *head, nn.Linear(channels, 10))


def resnet18(width: float = 1.0) -> nn.Module:
    """ResNet18 with a stem of one 3x3 convolution, times `width`."""
    channels = int(64 * width)
    layers: list[nn.Module] = [*_normalised(3, channels, 3, 1), nn.ReLU(inplace=True)]
    for size, stride in _RESNET18:
        layers.append(_Block(channels, int(size * width), stride))
        channels = int(size * width)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


NETWORKS: dict[str, Callable[[float], nn.Module]] = {"vgg16": vgg16, "resnet18": resnet18}


def pretrained(name: str, folder: Path | None) -> nn.Module:
    """ResNet20 or ResNet32 with published weights, trained on lossless CIFAR-10.

    Images are to be normalised by ImageNet's means and deviations.

    Parameters
    ----------
    name : {"resnet20", "resnet32"}
    folder : Path or None
        Where ``pretrained-cifar-resnet/`` may lie; what is not there is downloaded.
    """
    file = f"{name}-{_SHA256[name][:8]}.th"
    path = find(folder, [f"pretrained-cifar-resnet/{file}"]) if folder else None
    path = path or download(f"{_TRAINED}/{file}", f"sha256:{_SHA256[name]}")
    saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = build(name, channels=3, image_size=32, classes=10)
    # they were saved from within a DataParallel
    model.load_state_dict({key.removeprefix("module."): value for key, value in saved.items()})
    return model


def at_compression(model: nn.Module, kept: float) -> tuple[nn.Module, float]:
    """Factorise a network by one fraction for all layers, the largest that meets a size.

    The first convolution, from three channels, stays dense.

    Parameters
    ----------
    model : nn.Module
        Is changed in place.
    kept : float
        Parameters that may be left, as a fraction of the whole model's.

    Returns
    -------
    nn.Module, float
        The model, and the fraction of its parameters that each layer has kept.
    """

    def first(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.in_channels == 3

    low, high = 1e-3, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        table = plan(model, gt.Fixed(middle), exclude=first)
        if table.after <= kept * table.before:
            low = middle
        else:
            high = middle
    return factorize(model, gt.Fixed(low), exclude=first, verbose=False), low


def convert(model: nn.Sequential, rank: int) -> nn.Sequential:
    """Turn every layer into a Tucker layer, also where `factorize` would see no gain, in place."""
    for i, layer in enumerate(model):
        kind: Any = {nn.Conv2d: TuckerConv2d, nn.Linear: TuckerLinear}.get(type(layer))
        if kind is not None:
            model[i] = kind.from_dense(layer, rank)
    return model


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def trainings(
    dense: nn.Module, settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[nn.Module, torch.optim.Optimizer]]:
    """Return models and optimizers by name: the dense network, and it with a tenth of its size.

    That by descent on core and factors, and by `TDLRT` with each of the settings; all on the
    device of the dense one.
    """
    device = next(dense.parameters()).device
    small = at_compression(deepcopy(dense).cpu(), 0.1)[0].to(device)
    plain = deepcopy(small).requires_grad_(True)
    found: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {
        "dense": (dense, sgd(dense)),
        "descent on core and factors": (plain, sgd(plain)),
    }
    for name, options in settings.items():
        model = deepcopy(small)
        found[name] = model, TDLRT(sgd(model), model, **options)
    return found


class _Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        first, second = _normalised(channels, out, 3, stride), _normalised(out, out, 3, 1)
        self.main = nn.Sequential(*first, nn.ReLU(inplace=True), *second)
        same = channels == out and stride == 1
        self.shortcut = nn.Sequential(*([] if same else _normalised(channels, out, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        return torch.relu(self.main(x) + self.shortcut(x))


def _normalised(channels: int, out: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out)]
