"""The data sets of the train command: read, checked, and refused with a reason."""

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from geotucker_torch._train import _cifar, _fetch, _idx
from geotucker_torch._train._config import RECIPES, START
from geotucker_torch._train._data import DATA_SETS, augment, load
from geotucker_torch._train._errors import DataError, OptionError
from geotucker_torch._train._models import MODELS
from geotucker_torch._train._order import Order


def idx_bytes(array: np.ndarray) -> bytes:
    """Return an array in idx form."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def tiny_idx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _idx.IdxSource:
    """Return a source whose four files, with few images, lie in tmp_path/tiny."""
    generator = np.random.default_rng(0)
    shapes = ((6, 28, 28), (6,), (3, 28, 28), (3,))
    monkeypatch.setattr(_idx, "_SHAPES", shapes)
    (tmp_path / "tiny").mkdir()
    plain, packed = [], []
    for part, shape in zip(_idx._PARTS, shapes, strict=True):
        data = idx_bytes(generator.integers(0, 10, shape))
        (tmp_path / "tiny" / f"{part}.gz").write_bytes(gzip.compress(data))
        plain.append(_fetch.md5(data))
        packed.append("0" * 32)
    return _idx.IdxSource("tiny", "http://localhost:9", ("tiny",), tuple(packed), tuple(plain))


def test_digits_is_complete_and_mixed() -> None:
    data = load("digits", None)
    assert data.train_images.dtype == torch.uint8
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert data.train_labels.bincount().min() > 100
    assert data.test_labels.bincount().min() > 20


def test_normalised_images_have_mean_zero_and_deviation_one() -> None:
    data = load("digits", None)
    images = data.normalise(data.train_images)
    assert images.dtype == torch.float32
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


def test_mnist_is_the_published_one(data_dir: Path) -> None:
    data = load("mnist", data_dir)
    assert data.train_images.shape == (60_000, 1, 28, 28)
    assert data.test_labels.bincount().tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


def test_jpeg_copy_is_never_called_cifar10(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_images(header: bytes, scans: list[bytes]) -> np.ndarray:
        few = decode(header, scans[:20])
        return np.concatenate([few, np.zeros((len(scans) - 20, 3, 32, 32), np.uint8)])

    decode = _cifar.decode_jpegs  # decoding all 60,000 takes too long for a test
    monkeypatch.setattr(_cifar, "decode_jpegs", first_images)
    data = load("cifar10", data_dir)
    assert data.name == "cifar10 (JPEG copy)"
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert data.test_labels.bincount().tolist() == [1000] * 10
    few = data.train_images[:20].float()
    assert few.std() > 30
    # neighbouring pixels of photographs are alike: rows, columns and channels are in order
    assert (few[..., 1:] - few[..., :-1]).abs().mean() < 0.5 * few.std()
    assert (few[..., 1:, :] - few[..., :-1, :]).abs().mean() < 0.5 * few.std()


def test_files_packed_anew_pass_by_their_plain_sums(
    tiny_idx: _idx.IdxSource, tmp_path: Path
) -> None:
    images, labels, _, test_labels = _idx.read_images_and_labels(tiny_idx, tmp_path)
    assert images.shape == (6, 28, 28)
    assert labels.shape == (6,)
    assert test_labels.dtype == np.uint8


def test_missing_file_is_named(tiny_idx: _idx.IdxSource, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"tiny/t10k-labels-idx1-ubyte\.gz.*leave out --data-dir"):
        _idx.read_images_and_labels(tiny_idx, tmp_path)


def test_truncated_gzip_is_named(tiny_idx: _idx.IdxSource, tmp_path: Path) -> None:
    path = tmp_path / "tiny" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a whole gzip file"):
        _idx.read_images_and_labels(tiny_idx, tmp_path)


def test_no_gzip_at_all_is_named(tiny_idx: _idx.IdxSource, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "train-images-idx3-ubyte.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="not a whole gzip file"):
        _idx.read_images_and_labels(tiny_idx, tmp_path)


def test_wrong_checksum_is_named(tiny_idx: _idx.IdxSource, tmp_path: Path) -> None:
    path = tmp_path / "tiny" / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(6))))
    with pytest.raises(DataError, match="MD5 sum is none of the published ones"):
        _idx.read_images_and_labels(tiny_idx, tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\x00", b"\x00\x00\x0d\x01\x00\x00\x00\x01", b"\x00\x00\x08\x01\x00\x00\x00\x05ab"],
    ids=["empty", "short", "floats", "fewer entries"],
)
def test_broken_idx_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="labels"):
        _idx.read_idx(content, Path("labels"))


def test_missing_data_folder_names_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"--data-dir: got nowhere"):
        _fetch.data_folder("nowhere")
    monkeypatch.setenv("GEOTUCKER_DATA_DIR", "nowhere")
    with pytest.raises(OptionError, match="GEOTUCKER_DATA_DIR"):
        _fetch.data_folder(None)
    monkeypatch.delenv("GEOTUCKER_DATA_DIR")
    assert _fetch.data_folder(None) is None


def test_no_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pooch

    monkeypatch.setattr(pooch, "os_cache", lambda _name: tmp_path)
    monkeypatch.setattr(pooch.core, "download_action", lambda *_: ("download", "Downloading"))
    with pytest.raises(DataError, match=r"could not download .*--data-dir"):
        _fetch.download("http://localhost:9/file.gz", "md5:" + "0" * 32)


def test_download_with_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pooch

    def write(_url: str, output_file: str, _pooch: object) -> None:
        Path(output_file).write_bytes(b"something else")

    monkeypatch.setattr(pooch, "os_cache", lambda _name: tmp_path)
    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *_, **__: write)
    with pytest.raises(DataError, match="does not have the published checksum"):
        _fetch.download("http://localhost:9/file.gz", "md5:" + "0" * 32)
    good = _fetch.download("http://localhost:9/file.gz", f"md5:{_fetch.md5(b'something else')}")
    assert good.read_bytes() == b"something else"


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return six batches of four images each."""
    generator = np.random.default_rng(0)
    monkeypatch.setattr(_cifar, "_PER_BATCH", 4)
    return {
        name: (
            generator.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8),
            generator.integers(0, 10, 4),
        )
        for name in _cifar._PYTHON_MD5
    }


def check_cifar(folder: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    name, (images, labels, test_images, test_labels) = _cifar.read_cifar10(folder)
    assert name == "cifar10"
    assert np.array_equal(images[4:8], batches["data_batch_2"][0])
    assert np.array_equal(labels[:4], batches["data_batch_1"][1])
    assert np.array_equal(test_images, batches["test_batch"][0])
    assert np.array_equal(test_labels, batches["test_batch"][1])


def write_binary(folder: Path, batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    folder.mkdir(parents=True)
    for name, (images, labels) in batches.items():
        records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(4, -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())


def test_binary_folder_and_archive(
    tmp_path: Path,
    small_cifar: dict[str, tuple[np.ndarray, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write_binary(folder, small_cifar)
    check_cifar(tmp_path, small_cifar)

    packed = tmp_path / "packed" / "cifar-10-binary.tar.gz"
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, "cifar-10-batches-bin")
    with pytest.raises(DataError, match="not the published"):
        _cifar.read_cifar10(packed.parent)
    monkeypatch.setattr(_cifar, "_BINARY_MD5", _fetch.md5(packed.read_bytes()))
    check_cifar(packed.parent, small_cifar)

    (folder / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(DataError, match=r"test_batch\.bin has 5 bytes"):
        _cifar.read_cifar10(tmp_path)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        _cifar.read_cifar10(tmp_path)


def test_python_folder_is_checked_before_it_is_unpickled(
    tmp_path: Path,
    small_cifar: dict[str, tuple[np.ndarray, np.ndarray]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name, (images, labels) in small_cifar.items():
        content = {b"data": images.reshape(4, -1), b"labels": labels.tolist()}
        data = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(data)
        sums[name] = _fetch.md5(data)
    with pytest.raises(DataError, match="MD5 sum of data_batch_1 is not the published"):
        _cifar.read_cifar10(tmp_path)
    monkeypatch.setattr(_cifar, "_PYTHON_MD5", sums)
    check_cifar(tmp_path, small_cifar)


def test_unpickler_builds_nothing_but_arrays() -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (__import__("os").system, ("true",))

    with pytest.raises(pickle.UnpicklingError, match="no place in CIFAR-10"):
        _cifar._ArraysOnly(io.BytesIO(pickle.dumps(Evil()))).load()


def test_cifar10_in_no_form_lists_the_forms(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cifar-10-batches-bin, cifar-10-batches-py"):
        load("cifar10", tmp_path)


def test_every_data_set_has_a_recipe_and_every_model_a_start() -> None:
    assert set(RECIPES) == set(DATA_SETS)
    assert set(START) == set(MODELS)


def test_augmented_images_are_shifted_copies() -> None:
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(50, 1, 1, 1)
    changed = augment(images, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape
    assert len({tuple(image.flatten().tolist()) for image in changed}) > 20
    for image in changed:
        inside = image[image > 0]
        assert set(inside.tolist()) <= set(images[0].flatten().tolist())
        assert len(inside) >= 16  # at most 4 rows and 4 columns go


def test_orders_of_one_seed_agree_and_see_every_image_once() -> None:
    first, second = Order(10, 3, seed=1), Order(10, 3, seed=1)
    for _ in range(2):
        first.start_epoch(), second.start_epoch()
        batches = [first.batch(step) for step in range(first.steps)]
        assert all(torch.equal(b, second.batch(i)) for i, b in enumerate(batches))
        assert sorted(torch.cat(batches).tolist()) == list(range(10))


def test_order_is_put_back_in_the_middle_of_an_epoch() -> None:
    order, other = Order(10, 3, seed=1), Order(10, 3, seed=2)
    order.start_epoch()
    torch.rand(3, generator=order.generator)  # draws of augmentation
    other.load_state_dict(order.state_dict())
    assert torch.equal(order.batch(2), other.batch(2))
    assert torch.equal(
        torch.rand(3, generator=order.generator), torch.rand(3, generator=other.generator)
    )
    order.start_epoch(), other.start_epoch()
    assert torch.equal(order.batch(0), other.batch(0))
