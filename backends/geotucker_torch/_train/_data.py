"""The four data sets: whole in memory as bytes, normalised batch by batch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._cifar import read_cifar10
from ._idx import FASHION_MNIST, MNIST, IdxSource, read_images_and_labels

__all__ = ["DATA_SETS", "DataSet", "augment", "load"]


@dataclass(frozen=True)
class DataSet:
    """Images and labels of a classification problem.

    Images are kept as bytes, a quarter of their size as floats; `normalise` makes floats of
    one batch at a time.

    Parameters
    ----------
    name : str
        What results on it may be called; ``"cifar10 (JPEG copy)"`` is not ``"cifar10"``.
    train_images, test_images : Tensor
        uint8, shape (number of images, channels, height, width).
    train_labels, test_labels : Tensor
        int64, shape (number of images,).
    mean, deviation : tuple of float
        Per channel, in units of the bytes.
    flips : bool
        Whether training images are shifted and mirrored at random: the customary recipe for
        CIFAR-10, harmful for digits.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    flips: bool = False
    classes: int = 10

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        """Height of an image, which is also its width."""
        return self.train_images.shape[2]

    def normalise(self, images: Tensor) -> Tensor:
        """Return float32 images of mean 0 and deviation 1 over the training set.

        Parameters
        ----------
        images : Tensor
            uint8, shape (batch, channels, height, width).
        """
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        deviation = torch.tensor(self.deviation, device=images.device).view(-1, 1, 1)
        return images.to(torch.float32).sub_(mean).div_(deviation)

    def to(self, device: torch.device) -> "DataSet":
        """Return the data set with its tensors on a device."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def load(name: str, folder: Path | None) -> DataSet:
    """Load a data set.

    Parameters
    ----------
    name : str
        A key of `DATA_SETS`.
    folder : Path or None
        Where the user's files lie; None downloads what is not in the cache yet.

    Raises
    ------
    DataError
        If a file is missing, damaged, or cannot be downloaded.

    Examples
    --------
    >>> data = load("digits", None)
    >>> data.train_images.shape, data.test_images.shape
    (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))
    """
    return DATA_SETS[name](folder)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels and mirror half of them.

    Parameters
    ----------
    images : Tensor
        uint8, shape (batch, channels, height, width).
    generator : torch.Generator
        On the CPU, so that the draws are the same on every device.

    Returns
    -------
    Tensor
        Same shape and dtype; the shifted-in border is black.
    """
    count, _, height, width = images.shape
    shifts = torch.randint(0, 9, (count, 2), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    rows = shifts[:, :1] + torch.arange(height)  # shape: (batch, height)
    columns = shifts[:, 1:] + torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    indices = (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :])
    image, row, column = (index.to(images.device) for index in indices)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    # advanced indices around a slice put the channels last
    return padded[image, :, row, column].permute(0, 3, 1, 2).contiguous()


def _digits(_folder: Path | None) -> DataSet:
    """scikit-learn's digits: 1797 images of 8x8 pixels with 17 grey levels."""
    from sklearn.datasets import load_digits  # here: it takes a second to import

    bunch: Any = load_digits()
    # The file is ordered by writer; a fixed permutation makes training and test set alike.
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = torch.from_numpy(bunch.images[order].astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target[order].astype(np.int64))
    train = 1437  # four fifths
    return DataSet(
        "digits", images[:train], labels[:train], images[train:], labels[train:], (4.9,), (6.0,)
    )


def _idx(source: IdxSource, mean: float, deviation: float) -> Callable[[Path | None], DataSet]:
    """Return a loader of one of the two data sets in idx form."""

    def load_idx(folder: Path | None) -> DataSet:
        arrays = [torch.from_numpy(array) for array in read_images_and_labels(source, folder)]
        images, labels, test_images, test_labels = arrays
        return DataSet(
            source.name,
            images.unsqueeze(1),
            labels.long(),
            test_images.unsqueeze(1),
            test_labels.long(),
            (mean * 255,),
            (deviation * 255,),
        )

    return load_idx


def _cifar10(folder: Path | None) -> DataSet:
    """CIFAR-10 in any of its forms, shifted and mirrored while training."""
    name, arrays = read_cifar10(folder)
    images, labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays)
    return DataSet(
        name,
        images,
        labels.long(),
        test_images,
        test_labels.long(),
        (0.4914 * 255, 0.4822 * 255, 0.4465 * 255),
        (0.2470 * 255, 0.2435 * 255, 0.2616 * 255),
        flips=True,
    )


# Means and deviations are those of the training sets, rounded as they are usually quoted.
DATA_SETS: dict[str, Callable[[Path | None], DataSet]] = {
    "digits": _digits,
    "mnist": _idx(MNIST, 0.1307, 0.3081),
    "fashion-mnist": _idx(FASHION_MNIST, 0.2860, 0.3530),
    "cifar10": _cifar10,
}
