"""Trained weights in a safetensors file, and the way back to a network."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from .. import factorize
from ._config import Config
from ._data import DataSet
from ._errors import ResumeError
from ._files import write_atomically
from ._models import build
from ._networks import Network

__all__ = ["load_weights", "save_weights"]

_KEY = "geotucker"  # one key only: safetensors writes several in a random order


def save_weights(path: Path, network: Network, config: Config, data: DataSet) -> None:
    """Write a network's weights: plain tensors under their state-dict names.

    Ranks need no entry of their own, they are the shapes of the cores. The file's metadata
    holds one JSON text with the model's name, the images' shape and the settings.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in network.model.state_dict().items()
    }
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
    metadata = {_KEY: json.dumps(about, sort_keys=True)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


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
        with safetensors.safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            about = json.loads(file.metadata()[_KEY])
        state = safetensors.torch.load_file(path)
        with torch.random.fork_rng(devices=[]):  # the fresh weights are thrown away
            shape = (about["channels"], about["image_size"], about["classes"])
            model = build(about["model"], *shape)
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"{path}: not weights that geotucker train wrote ({error})") from error
    # At rank 1 every layer shrinks, as factorize demands; loading brings the final ranks.
    factorize(model, dict.fromkeys(about["ranks"], 1), verbose=False)
    model.load_state_dict(state)
    return model.eval()
