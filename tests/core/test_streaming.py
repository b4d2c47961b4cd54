"""Tensors in files: decomposed in pieces as in memory, reconstructed, saved, refused."""

import errno
import math
import os
import re
import stat
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import geotucker as gt
from geotucker._files import NpyFile, replacing

from .cases import assert_close

RNG = np.random.default_rng(0)
TRUTH = gt.testing.random_point((12, 14, 16), (3, 4, 5), seed=1)
TENSOR = gt.to_dense(TRUTH)
NOISY = TENSOR + 1e-3 * RNG.standard_normal(TENSOR.shape)
SMALL = 7 * TENSOR.nbytes  # too little to hold the tensor for its SVD; seven rows are a piece


@pytest.fixture
def put(tmp_path):
    """Save an array and return its path."""

    def save(array, name="data.npy"):
        np.save(tmp_path / name, array)
        return tmp_path / name

    return save


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# Decomposition.


@st.composite
def tensors(draw):
    """Draw a tensor of low ranks with noise, in C or Fortran order."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple))
    seed = draw(st.integers(0, 2**16))
    noise = draw(st.sampled_from([0.0, 1e-3, 1.0]))
    ranks = tuple(min(2, n) for n in shape)
    tensor = gt.to_dense(gt.testing.random_point(shape, ranks, seed))
    tensor = tensor + noise * np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(tensor, order=draw(st.sampled_from("CF")))


@given(tensor=tensors(), tau=st.sampled_from([0.5, 0.05, 1e-4, 1e-9, 1e-13]), share=st.data())
def test_the_bound_of_the_error_holds(tmp_path_factory, tensor, tau, share):
    path = tmp_path_factory.mktemp("streaming") / "data.npy"
    np.save(path, tensor)
    # From just enough for pieces of one fibre to enough for all.
    memory = share.draw(st.sampled_from([1, 2, 4, 40])) * 12 * max(tensor.nbytes // 8, 72)
    try:
        result = gt.decompose_file(path, gt.Tolerance(tau), memory=memory)
    except gt.MemoryLimitError:
        assert memory < 12 * tensor.nbytes
        return
    got = gt.to_dense(result.point)
    assert result.point.shape == tensor.shape
    assert np.linalg.norm(got - tensor) <= (tau + 1e-14) * np.linalg.norm(tensor)
    assert result.error == pytest.approx(relative(got, tensor), rel=1e-6, abs=1e-14)
    gt.testing.check_orthonormal(result.point)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("ranks", [(3, 4, 5), 3, 0.2, gt.Tolerance(0.05)])
def test_in_pieces_as_in_memory(put, order, ranks):
    path = put(np.asarray(NOISY, order=order))
    pieces, whole = (gt.decompose_file(path, ranks, memory=m) for m in (SMALL, 2**30))
    assert pieces.passes >= 2
    assert whole.passes == 1
    assert pieces.point.ranks == whole.point.ranks
    assert ranks != (3, 4, 5) or pieces.point.ranks == ranks  # not reversed in Fortran order
    assert pieces.error == pytest.approx(whole.error, rel=0.1)  # the order of modes matters little
    assert pieces.error == pytest.approx(relative(gt.to_dense(pieces.point), NOISY), rel=1e-8)


def test_singular_values_that_drown_when_squared(put):
    """1, 1e-5, 1e-10: one Gram matrix shows the first two, the rest takes a second pass."""
    values = [1.0, 1e-5, 1e-10, 1e-14]
    truth = gt.testing.random_point((12, 14, 16), (4,) * 3, seed=2, singular_values=values)
    path = put(gt.to_dense(truth))
    for tau, rank in ((1e-3, 1), (1e-7, 2), (1e-12, 3)):
        result = gt.decompose_file(path, gt.Tolerance(tau), memory=SMALL)
        assert result.point.ranks == (rank,) * 3
        assert result.error == pytest.approx(values[rank], rel=0.05)
        gt.testing.check_orthonormal(result.point)
    coarse = gt.decompose_file(path, gt.Tolerance(1e-3), memory=SMALL)
    assert coarse.passes < result.passes <= 4 * coarse.passes


def test_fixed_ranks_beyond_those_of_the_tensor(put):
    result = gt.decompose_file(put(TENSOR), (6, 6, 6), memory=SMALL)
    assert result.point.ranks == (6, 6, 6)
    assert result.error < 1e-14
    gt.testing.check_orthonormal(result.point)


def test_leading_axes_are_walked_through(put):
    """The first axis is too short, and one of its slices too large, to go slice by slice."""
    truth = gt.testing.random_point((2, 40, 30), (2, 3, 3), seed=3)
    result = gt.decompose_file(put(gt.to_dense(truth)), gt.Tolerance(1e-6), memory=8 * 40 * 30 * 6)
    assert result.point.ranks == (2, 3, 3)
    assert result.error < 1e-13


def test_zero_and_vectors(put):
    zero = gt.decompose_file(put(np.zeros((12, 14, 16))), gt.Tolerance(0.1), memory=SMALL)
    assert (zero.point.ranks, zero.error) == ((1, 1, 1), 0.0)
    vector = gt.decompose_file(put(np.arange(5.0)), gt.Tolerance(0.1))
    assert_close(gt.to_dense(vector.point), np.arange(5.0), 1e-14)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        ("f2", "float32"),
        ("f4", "float32"),
        (">f4", "float32"),
        ("f8", "float64"),
        (">f8", "float64"),
        ("i1", "float64"),
        ("u2", "float64"),
        ("i8", "float64"),
        ("?", "float64"),
    ],
)
def test_real_dtypes_are_converted(put, dtype, result):
    array = (5 * NOISY).astype(dtype)
    got = gt.decompose_file(put(array), 12, memory=SMALL)
    assert {part.dtype.name for part in (got.point.core, *got.point.factors)} == {result}
    measured = relative(gt.to_dense(got.point), array.astype("f8"))
    assert 0.0 < measured == pytest.approx(got.error, rel=1e-3, abs=1e-7)


def test_progress_is_shown_for_each_pass(put, capsys):
    result = gt.decompose_file(put(NOISY), 3, memory=SMALL, progress=True)
    out, shown = capsys.readouterr()
    assert out == ""
    assert len(re.findall(r"100%", shown)) == result.passes
    assert "projection" in shown


# Reconstruction, saving.


@given(tensor=tensors(), limit=st.sampled_from([1, 100, 1000, 2**20]))
def test_reconstruction_in_pieces(tmp_path_factory, tensor, limit):
    path = tmp_path_factory.mktemp("streaming") / "full.npy"
    point = gt.hosvd(tensor, 0.9)
    gt.reconstruct_file(point, path, memory=12 * limit)
    got = np.load(path)
    assert got.flags.c_contiguous
    assert_close(got, gt.to_dense(point), 1e-14)


def test_save_and_load_on_every_backend(backend, tmp_path):
    point = gt.TuckerPoint(
        backend.array(TRUTH.core), tuple(backend.array(u) for u in TRUTH.factors)
    )
    gt.save(tmp_path / "point.tucker.npz", point)
    loaded = gt.load(tmp_path / "point.tucker.npz")
    for got, expected in zip(
        (loaded.core, *loaded.factors), (TRUTH.core, *TRUTH.factors), strict=True
    ):
        assert isinstance(got, np.ndarray)
        assert np.array_equal(got, expected)
    gt.reconstruct_file(point, tmp_path / "full.npy", progress=False)
    assert_close(np.load(tmp_path / "full.npy"), TENSOR, 1e-14)


def test_bfloat16_is_saved_as_single_precision(tmp_path):
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    for ones in (
        lambda *shape: torch.ones(shape, dtype=torch.bfloat16, requires_grad=True),
        lambda *shape: jax.numpy.ones(shape, jax.numpy.bfloat16),
    ):
        point = gt.TuckerPoint(ones(1, 1), (ones(3, 1), ones(2, 1)))
        gt.save(tmp_path / "point.npz", point, overwrite=True)
        loaded = gt.load(tmp_path / "point.npz")
        assert {array.dtype for array in (loaded.core, *loaded.factors)} == {np.dtype("f4")}
        gt.reconstruct_file(point, tmp_path / "full.npy", overwrite=True)
        assert np.array_equal(np.load(tmp_path / "full.npy"), np.ones((3, 2), "f4"))


def test_a_file_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "result"

    def write(content, error=None):
        with replacing(path, overwrite=True) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"whole"
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write(b"half", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []
    write(b"whole")
    with pytest.raises(RuntimeError):
        write(b"half", RuntimeError())
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_may_write_one_file(tmp_path):
    # Both are open at once; what the last one to end has written is there as a whole.
    path = tmp_path / ("very long name " * 16)
    with replacing(path, overwrite=True) as first:
        first.write(b"half of ")
        with replacing(path, overwrite=True) as second:
            second.write(b"another")
        assert path.read_bytes() == b"another"
        first.write(b"the first")
    assert path.read_bytes() == b"half of the first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
def test_a_private_file_stays_private(tmp_path):
    path = tmp_path / "result"
    path.touch(0o600)
    with replacing(path, overwrite=True) as file:
        (beside,) = tmp_path.glob(".*")
        assert beside.stat().st_mode & 0o777 == 0o600
        file.write(b"whole")
    assert path.stat().st_mode & 0o777 == 0o600


def test_existing_files_stay(tmp_path):
    path = tmp_path / "point.tucker.npz"
    gt.save(path, TRUTH)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        gt.save(path, gt.scale(TRUTH, 2.0))
    with pytest.raises(FileExistsError, match="exists already"):
        gt.reconstruct_file(TRUTH, path)
    assert path.read_bytes() == before
    gt.save(path, gt.scale(TRUTH, 2.0), overwrite=True)
    assert_close(gt.load(path).core, 2 * TRUTH.core, 1e-15)


@pytest.mark.skipif(os.name != "posix", reason="devices are files on POSIX")
def test_what_is_no_file_stays(tmp_path):
    device, folder, link = tmp_path / "device", tmp_path / "folder", tmp_path / "link"
    os.mkfifo(device)
    folder.mkdir()
    link.symlink_to(folder)
    for path, error, message in (
        (device, FileExistsError, "device: expected the name of a file"),
        (folder, IsADirectoryError, "folder: expected the name of a file"),
        (link, IsADirectoryError, "link: expected the name of a file"),
        (tmp_path / "no" / "file", FileNotFoundError, "file: there is no folder .*no; make it"),
    ):
        for overwrite in (False, True):
            with pytest.raises(error, match=message), replacing(path, overwrite):
                raise AssertionError("nothing is to be written")
    assert sorted(tmp_path.iterdir()) == [device, folder, link]


@pytest.mark.skipif(os.name != "posix", reason="a call of POSIX")
def test_a_file_is_written_where_folders_cannot_be_synchronised(tmp_path, monkeypatch):
    fsync, path = os.fsync, tmp_path / "result"
    number = errno.EINVAL  # of network file systems

    def of_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    with replacing(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output"), replacing(path, overwrite=True):
        pass


# Errors.

NAN = NOISY.copy()
NAN[7, 3, 2] = np.nan
ERRORS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "complex": (NOISY + 1j, 2, gt.BackendError, "got complex128; decompose its real and"),
    "text": (np.array(["a", "b"]), 2, gt.BackendError, "expected real numbers of at most 64 bits"),
    "long": (np.ones(3, np.longdouble), 1, gt.BackendError, "expected real numbers of at most 64"),
    "records": (np.zeros(2, "f8,f8"), 1, gt.BackendError, "expected real numbers"),
    "empty": (np.ones((3, 0)), 1, gt.ShapeError, "at least one entry, got shape (3, 0)"),
    "scalar": (np.ones(()), 1, gt.ShapeError, "at least one entry, got shape ()"),
    "nan": (NAN, 2, gt.NonFiniteError, "got NaN or infinity among the entries 1568 to 2687"),
    "infinite": (NAN * np.inf, 2, gt.NonFiniteError, "expected finite numbers"),
    "huge": (NOISY * 1e200, 2, gt.NonFiniteError, "leaves the range of float64; scale"),
    "huge for single precision": (
        np.full((8, 8), 3e38, "f4"),
        2,
        gt.NonFiniteError,
        "expected a norm of at most 3.4e+38, the largest number of float32, got 2.4e+39; scale",
    ),
    "tiny": (NOISY * 1e-200, 2, gt.NonFiniteError, "leaves the range of float64; scale"),
    "ranks": (NOISY, (2, 2), gt.RankError, "expected 3 positive integers"),
    "budget": (NOISY, gt.Budget(parameters=9), gt.RankError, "decompose_file needs a rule that"),
    "fibre": (np.ones((3, 5000)), 1, gt.MemoryLimitError, "a piece of a tensor of shape (3, 5000)"),
    "what is left": (NOISY, 16, gt.MemoryLimitError, "lower the ranks, or allow more memory"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.filterwarnings("ignore:.*invalid value encountered:RuntimeWarning")
def test_errors(put, name):
    array, ranks, kind, message = ERRORS[name]
    with np.errstate(all="ignore"), pytest.raises(kind, match=re.escape(message)):
        gt.decompose_file(put(array), ranks, memory=SMALL)


def test_files_that_are_no_arrays(tmp_path, put):
    text = tmp_path / "text.npy"
    text.write_text("1 2 3")
    archive = tmp_path / "archive.npz"
    np.savez(archive, a=np.ones(2))
    for path in (text, archive):
        with pytest.raises(gt.FileFormatError, match=r"expected a \.npy file"):
            gt.decompose_file(path, 1)
    short = put(NOISY)
    short.write_bytes(short.read_bytes()[:-24])
    with pytest.raises(gt.FileFormatError, match="cut off, 24 bytes are missing"):
        gt.decompose_file(short, 1)
    with pytest.raises(FileNotFoundError):
        gt.decompose_file(tmp_path / "nothing.npy", 1)


def test_files_that_are_no_tucker_tensors(tmp_path, put):
    other, cut = tmp_path / "other.npz", tmp_path / "cut.npz"
    np.savez(other, a=np.ones(2), b=np.ones(2))
    gt.save(cut, TRUTH)
    cut.write_bytes(cut.read_bytes()[:200])
    empty = tmp_path / "empty.npz"
    empty.touch()
    for path in (other, cut, empty, put(NOISY)):
        with pytest.raises(gt.FileFormatError, match="expected a Tucker tensor"):
            gt.load(path)
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, core=np.ones((2, 2)), factor_0=np.ones((3, 2)), factor_1=np.ones((3, 1)))
    with pytest.raises(gt.ShapeError, match=r"wrong\.npz\.factors\[1\]: expected shape"):
        gt.load(wrong)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, core=np.array([{}], dtype=object), factor_0=np.ones((2, 2)))
    with pytest.raises(gt.FileFormatError, match="expected a Tucker tensor"):
        gt.load(pickled)


@pytest.mark.parametrize("place", [10, 22, 61, 66, 127])
def test_damaged_headers_are_told(put, place):
    # Among what these characters make of it: no tokens, leading zeros, negative sides.
    whole = put(NOISY).read_bytes()
    for character in b"0-[({'\"#\n\xfe":
        path = put(NOISY)
        path.write_bytes(whole[:place] + bytes([character]) + whole[place + 1 :])
        with suppress(gt.FileFormatError, gt.BackendError, gt.ShapeError):
            gt.decompose_file(path, 2)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_damaged_archives_are_told(tmp_path, write):
    path = tmp_path / "point.npz"
    write(path, core=np.ones((1, 2)), factor_0=np.ones((3, 1)), factor_1=np.ones((2, 2)))
    whole = path.read_bytes()
    for place in range(0, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFE
        path.write_bytes(damaged)
        with suppress(gt.FileFormatError, gt.ShapeError, gt.NonFiniteError):
            gt.load(path)


def test_reads_are_pieces_of_the_file(put):
    file = NpyFile(put(np.asarray(NOISY, order="F")))
    assert file.shape == NOISY.shape[::-1]
    assert np.array_equal(file.read(5, 12), NOISY.flatten("F")[5:12])
    assert math.prod(file.shape) == NOISY.size
