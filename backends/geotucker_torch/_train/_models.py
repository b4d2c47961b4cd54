"""The networks that can be trained, by name; each adapts to the images' channels and size."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._errors import OptionError

__all__ = ["MODELS", "build"]

Builder = Callable[[int, int, int], nn.Module]


def build(name: str, channels: int, image_size: int, classes: int) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global generator.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    channels, image_size, classes : int
        Number of channels, height (and width) of an image, number of classes.

    Raises
    ------
    OptionError
        If the images are too small for the network.

    Examples
    --------
    >>> sum(p.numel() for p in build("lenet5", 1, 28, 10).parameters())
    431080
    """
    builder, smallest = MODELS[name]
    if image_size < smallest:
        fitting = ", ".join(key for key, (_, least) in MODELS.items() if image_size >= least)
        raise OptionError(
            "--model", name, f"one that takes {image_size}x{image_size} images: {fitting}"
        )
    return builder(channels, image_size, classes)


def _mlp(channels: int, image_size: int, classes: int) -> nn.Module:
    """Two hidden layers of 256 units."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    layers["fc1"] = nn.Linear(channels * image_size**2, 256)
    layers["relu1"] = nn.ReLU()
    layers["fc2"] = nn.Linear(256, 256)
    layers["relu2"] = nn.ReLU()
    layers["fc3"] = nn.Linear(256, classes)
    return nn.Sequential(layers)


def _convnet(channels: int, image_size: int, classes: int) -> nn.Module:
    """Two 3x3 convolutions and two fully connected layers, for images as small as 8x8."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(channels, 32, 3, padding=1)
    layers["relu1"] = nn.ReLU()
    layers["conv2"] = nn.Conv2d(32, 64, 3, padding=1)
    layers["relu2"] = nn.ReLU()
    layers["pool2"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(64 * (image_size // 2) ** 2, 128)
    layers["relu3"] = nn.ReLU()
    layers["fc2"] = nn.Linear(128, classes)
    return nn.Sequential(layers)


def _lenet5(channels: int, image_size: int, classes: int) -> nn.Module:
    """LeNet-5 in Caffe's form, 20-50-500-10: 431,080 parameters on MNIST.

    Rectifiers follow the convolutions too, as in most later versions; Caffe's own file has
    the one after fc1 only. The number of parameters is the same.
    """
    side = ((image_size - 4) // 2 - 4) // 2
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(channels, 20, 5)
    layers["relu1"] = nn.ReLU()
    layers["pool1"] = nn.MaxPool2d(2)
    layers["conv2"] = nn.Conv2d(20, 50, 5)
    layers["relu2"] = nn.ReLU()
    layers["pool2"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(50 * side**2, 500)
    layers["relu3"] = nn.ReLU()
    layers["fc2"] = nn.Linear(500, classes)
    return nn.Sequential(layers)


def _vgg8(channels: int, image_size: int, classes: int) -> nn.Module:
    """Three pairs of batch-normalised 3x3 convolutions and two fully connected layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    previous = channels
    for index, width in enumerate((64, 64, 128, 128, 256, 256), start=1):
        layers[f"conv{index}"] = nn.Conv2d(previous, width, 3, padding=1, bias=False)
        layers[f"norm{index}"] = nn.BatchNorm2d(width)
        layers[f"relu{index}"] = nn.ReLU()
        if index % 2 == 0:
            layers[f"pool{index}"] = nn.MaxPool2d(2)
        previous = width
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(previous * (image_size // 8) ** 2, 256)
    layers["relu7"] = nn.ReLU()
    layers["fc2"] = nn.Linear(256, classes)
    return nn.Sequential(layers)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al. 2016)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.extra = width - before

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, before, h, w) to (batch, width, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.extra:
            half = self.extra // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, half, self.extra - half))
        return F.relu(y + shortcut)


class _ResNet(nn.Module):
    """The CIFAR ResNet of three stages (He, Zhang, Ren, Sun 2016): widths 16, 32, 64."""

    def __init__(self, channels: int, classes: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(before: int, width: int, stride: int, blocks: int) -> nn.Sequential:
        """Return the blocks of a stage, the first of which may halve the image."""
        first = _Block(before, width, stride)
        return nn.Sequential(first, *(_Block(width, width, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (batch, channels, h, w) to logits (batch, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.mean(x, dim=(2, 3)))


def _resnet(depth: int) -> Builder:
    """Return the builder of a ResNet, which averages over the image and so takes any size."""

    def builder(channels: int, _image_size: int, classes: int) -> nn.Module:
        return _ResNet(channels, classes, blocks=(depth - 2) // 6)

    return builder


# Name: the builder, and the smallest height and width of image that it takes.
MODELS: dict[str, tuple[Builder, int]] = {
    "convnet": (_convnet, 2),
    "mlp": (_mlp, 1),
    "lenet5": (_lenet5, 16),
    "resnet20": (_resnet(20), 4),
    "resnet32": (_resnet(32), 4),
    "vgg8": (_vgg8, 8),
}
