"""The promises about packages: what they load, what they export, where they come from.

Who may import whom inside the source is import-linter's business (``tox -e imports``).
"""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("geotucker", "geotucker_torch", "geotucker_cupy", "geotucker_sklearn")
ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str) -> str:
    """Run `code` in a new interpreter that searches what this one searches; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["geotucker", "geotucker._cli"])
def test_core_loads_no_array_library(name: str) -> None:
    heavy = ("torch", "jax", "cupy", "sklearn", "tltorch", "matplotlib", "typer", "rich")
    code = f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_core_leaves_the_backend_of_tensorly_alone() -> None:
    code = """
import tensorly as tl
tl.set_backend("numpy")
before = tl.get_backend()
import torch, geotucker as gt
gt.hosvd(torch.ones(2, 3), 1)
print(before, tl.get_backend())
"""
    assert run_python(code).split() == ["numpy", "numpy"]


def test_cupy_binding_imports_without_cupy() -> None:
    code = "import sys; sys.modules['cupy'] = None; import geotucker_cupy; print('imported')"
    assert run_python(code).strip() == "imported"


def test_sklearn_binding_says_what_it_needs() -> None:
    code = """
import sys
sys.modules["sklearn"] = None
try:
    import geotucker_sklearn
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install 'geotucker[sklearn]'" in run_python(code)


@pytest.mark.parametrize("name", PACKAGES)
def test_public_list_is_exact(name: str) -> None:
    package = importlib.import_module(name)
    declared = set(package.__all__)
    assert len(declared) == len(package.__all__), "declared twice"
    assert declared - set(vars(package)) == set(), "declared but missing"
    public = {key for key in vars(package) if not key.startswith("_")}
    assert public - declared == set(), "public but undeclared"


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_have_docstrings(name: str) -> None:
    package = importlib.import_module(name)
    members = [package]
    members += [getattr(package, key) for key in package.__all__]
    missing = [
        member.__name__
        for member in members
        if inspect.ismodule(member) or inspect.isclass(member) or inspect.isfunction(member)
        if not has_own_docstring(member)
    ]
    assert missing == []


def has_own_docstring(member: object) -> bool:
    """Tell whether `member` says something itself; a class inherits its parent's text."""
    text = vars(member).get("__doc__") if inspect.isclass(member) else inspect.getdoc(member)
    # What dataclass and NamedTuple write themselves is no documentation.
    return bool(text) and not text.startswith(f"{getattr(member, '__name__', '')}(")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_marked_as_typed(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    assert (Path(file).parent / "py.typed").is_file()


@pytest.mark.skipif(
    os.environ.get("GEOTUCKER_TEST_INSTALLED") != "1", reason="the source tree is under test"
)
@pytest.mark.parametrize("name", PACKAGES)
def test_installed_packages_are_under_test(name: str) -> None:
    file = Path(str(importlib.import_module(name).__file__)).resolve()
    assert ROOT / name not in file.parents
    assert ROOT / "backends" not in file.parents


@pytest.mark.xdist_group("groups")
def test_groups_of_tests_share_a_worker(request: pytest.FixtureRequest) -> None:
    # pytest-xdist 3.8 tells them by the end of a test's name, which pytest 9.2 does not let it set.
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@groups")
