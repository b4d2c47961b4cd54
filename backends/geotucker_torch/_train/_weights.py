"""Trained weights in a file of their own, and the way back to a network."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import factorize
from .._checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ._config import Config
from ._data import DataSet
from ._errors import ResumeError
from ._models import build
from ._networks import Network

__all__ = ["load_weights", "save_weights"]


def save_weights(path: Path, network: Network, config: Config, data: DataSet) -> None:
    """Write a network's weights, and what it takes to build the network: shape and settings."""
    settings = json.loads(config.to_json())
    for circumstance in ("data_dir", "device", "checkpoint_every"):  # leaves no trace in a weight
        settings.pop(circumstance)
    about: dict[str, Any] = {
        "network": network.name,
        "model": config.model,
        "data": data.name,
        "channels": data.channels,
        "image_size": data.image_size,
        "classes": data.classes,
        "ranks": {name: list(ranks) for name, ranks in network.ranks.items()},
        "parameters": network.parameters,
        "settings": settings,
    }
    save_checkpoint(path, network.model, about=about)


def load_weights(path: Path | str) -> nn.Module:
    """Build the network that a file of weights belongs to, and fill it.

    Parameters
    ----------
    path : Path or str
        A ``model.safetensors`` or ``dense.safetensors`` that ``geotucker train`` wrote.

    Returns
    -------
    nn.Module
        In evaluation mode, on the CPU.

    Raises
    ------
    ResumeError
        If the file is not one of these.
    """
    try:
        about = load_checkpoint(path)["about"]
        with torch.random.fork_rng(devices=[]):  # the fresh weights are thrown away
            shape = (about["channels"], about["image_size"], about["classes"])
            model = build(about["model"], *shape)
        # At rank 1 every layer shrinks, as factorize demands; loading brings the final ranks.
        factorize(model, dict.fromkeys(about["ranks"], 1), verbose=False)
        load_checkpoint(path, model)
    except (CheckpointError, OSError, LookupError, TypeError) as error:
        raise ResumeError(f"{path}: not weights that geotucker train wrote ({error})") from error
    return model.eval()
