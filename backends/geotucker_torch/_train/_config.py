"""The settings of a run: a frozen record that checks itself and fills in its defaults."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ._data import DATA_SETS
from ._errors import OptionError
from ._models import MODELS
from ._ranks import RankPlan, Ranks, parse_budget, parse_ranks

__all__ = ["DEFAULT_LR", "OPTIMIZERS", "RECIPES", "SCHEDULES", "START", "Config", "Recipe"]

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
SCHEDULES = ("cosine", "constant")
DEVICES = ("auto", "cpu", "cuda")
# Integers go into torch's of 64 bits. Optimizers multiply rates by some powers of ten, and raise
# errors of their own where single precision ends, at 3e38.
_MOST, _MOST_THREADS, _LARGEST = 2**63 - 1, 4096, 1e32
DEFAULT_LR = {"sgd": 0.2, "momentum": 0.05, "adam": 1e-3, "adamw": 1e-3}


@dataclass(frozen=True)
class Recipe:
    """Defaults that depend on the data set."""

    model: str
    epochs: int
    batch_size: int
    optimizer: str
    weight_decay: float
    threads: int | None  # None: torch's choice
    tolerance: float  # of a run that names neither tolerance nor ranks


# The tensors of digits are too small to share between threads: two take longer than one.
RECIPES = {
    "digits": Recipe("convnet", 15, 32, "sgd", 0.0, 1, 0.3),
    "mnist": Recipe("lenet5", 12, 128, "sgd", 0.0, None, 0.3),
    "fashion-mnist": Recipe("lenet5", 12, 128, "sgd", 0.0, None, 0.3),
    "cifar10": Recipe("vgg8", 30, 128, "momentum", 5e-4, None, 0.2),
}

# Ranks that an adaptive run starts from: well above those that it ends at, well below full ones.
START: dict[str, Ranks] = {
    "convnet": 32,
    "mlp": 32,
    "lenet5": 32,
    "resnet20": 0.5,
    "resnet32": 0.5,
    "vgg8": 64,
}


@dataclass(frozen=True)
class Config:
    """Everything that decides how a run goes.

    Fields that are None on the way in (model, lr, epochs, ...) are set by the data set's
    recipe, so that a finished record has no open question and can be saved.

    Raises
    ------
    OptionError
        If a value is out of its range. The error names the option.

    Examples
    --------
    >>> Config(data="mnist").model
    'lenet5'
    """

    # what is learnt, by what
    data: str = "digits"
    data_dir: str | None = None
    model: str | None = None
    # the Tucker format
    budget: str | None = None
    tolerance: float | None = None
    ranks: tuple[str, ...] = ()
    floor: int = 1
    cap: int | None = None
    basis_every: int | None = None
    rate_power: float | None = None
    tensorise: int | None = None
    # the recipe, the same for the dense baseline
    optimizer: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: str = "cosine"
    batch_size: int | None = None
    epochs: int | None = None
    seed: int = 0
    # the machine
    device: str = "auto"
    threads: int | None = None
    # the run
    baseline: bool = True
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        """Check what was given, fill in what was not, and check the ranks' grammar."""
        _one_of("--data", self.data, DATA_SETS)
        self._fill(RECIPES[self.data])
        _one_of("--model", self.model, MODELS)
        _one_of("--optimizer", self.optimizer, OPTIMIZERS)
        _one_of("--schedule", self.schedule, SCHEDULES)
        _one_of("--device", self.device, DEVICES)
        if self.lr is None:
            self._set(lr=DEFAULT_LR[str(self.optimizer)])
        if self.threads is None:
            self._set(threads=torch.get_num_threads())
        self._set(device=_device(self.device))
        for name in ("floor", "cap", "basis_every", "batch_size", "epochs"):
            _count(name, getattr(self, name), 1)
        for name in ("seed", "checkpoint_every"):
            _count(name, getattr(self, name), 0)
        _count("threads", self.threads, 1, _MOST_THREADS)
        if self.cap is not None and self.cap < self.floor:
            raise OptionError("--cap", self.cap, f"at least --floor, which is {self.floor}")
        below = f"below {_LARGEST:g}"
        _in_range("--lr", self.lr, 0.0, _LARGEST, f"a positive number {below}", exclusive=True)
        decay = f"zero or a positive number {below}"
        _in_range("--weight-decay", self.weight_decay, 0.0, _LARGEST, decay)
        if self.rate_power is not None and not 0.0 <= self.rate_power <= 1.0:
            raise OptionError("--rate-power", self.rate_power, "a number from 0 to 1")
        _in_range("--tolerance", self.tolerance, 0.0, 1.0, "a number from 0 to less than 1")
        if self.budget is not None:
            parse_budget(self.budget)
            if self.tolerance is not None:
                raise OptionError("--budget", self.budget, "no --tolerance beside it")
        if self.tensorise is not None:
            _count("tensorise", self.tensorise, 2)
            if self.budget is None or self.ranks:
                expected = "a --budget and no --ranks beside it: ranks of matrices fit no tensors"
                raise OptionError("--tensorise", self.tensorise, expected)
        _ = self.plan

    @property
    def plan(self) -> RankPlan:
        """Ranks of the layers, at the start or throughout."""
        return parse_ranks(self.ranks, default=START[str(self.model)])

    @property
    def adaptive(self) -> bool:
        """Whether the ranks follow a rule."""
        return self.tolerance is not None or self.budget is not None

    def _fill(self, recipe: Recipe) -> None:
        """Take open values from the data set's recipe."""
        for field in dataclasses.fields(recipe):
            if field.name != "tolerance" and getattr(self, field.name) is None:
                self._set(**{field.name: getattr(recipe, field.name)})
        if self.tolerance is None and self.budget is None and not self.ranks:
            self._set(tolerance=recipe.tolerance)

    def _set(self, **values: Any) -> None:
        """Set fields while the record is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "Config":
        """Return the record that `dataclasses.asdict` or a JSON file describes.

        Raises
        ------
        TypeError
            If a value is of another type than the command line makes it.
        """
        values = {**values, "ranks": tuple(values["ranks"])}
        for field in dataclasses.fields(cls):
            _check_type(field.name, values.get(field.name, field.default), field.type)
        return cls(**values)


def _check_type(name: str, value: Any, kind: Any) -> None:
    """Check a value by a field's type; JSON may have integers for floats."""
    if name == "ranks":
        fits = all(isinstance(item, str) for item in value)
    else:
        fits = isinstance(value, kind | int if float in get_args(kind) else kind)
    if not fits:
        expected = kind.__name__ if type(kind) is type else kind
        raise TypeError(f"{name}: expected {expected}, got {value!r}")


def _one_of(option: str, value: str | None, allowed: Iterable[str]) -> None:
    """Check a name, and suggest the nearest one."""
    names = list(allowed)
    if value not in names:
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise OptionError(option, repr(value), f"one of {', '.join(names)}{hint}")


def _count(name: str, value: int | None, least: int, most: int = _MOST) -> None:
    """Check a count."""
    if value is not None and not least <= value <= most:
        bound = f"at least {least}" if value < least else f"at most {most}"
        raise OptionError(f"--{name.replace('_', '-')}", value, f"an integer of {bound}")


def _in_range(
    option: str,
    value: float | None,
    low: float,
    high: float,
    expected: str,
    exclusive: bool = False,
) -> None:
    """Check that a number is in [low, high), or in (low, high); NaN never is."""
    if value is not None and not (low <= value < high and not (exclusive and value == low)):
        raise OptionError(option, value, expected)


def _device(name: str) -> str:
    """Return the device to use: a GPU if there is one and nothing else was asked for."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise OptionError("--device", name, "a machine where torch sees a GPU, or cpu")
    return "cuda" if name != "cpu" and available else "cpu"
