"""IDX files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from qat.data.idx import idx

PIXELS = np.arange(6 * 2 * 3, dtype=np.uint8).reshape(6, 2, 3)
CLASSES = np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8)


def _write(path: Path, array: np.ndarray, *, zipped: bool = False) -> str:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    data = head + array.tobytes()
    path.write_bytes(gzip.compress(data) if zipped else data)
    return str(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_images_and_classes_are_read_zipped_or_not(tmp_path: Path, zipped: bool) -> None:
    source = idx(
        _write(tmp_path / "x", PIXELS, zipped=zipped),
        _write(tmp_path / "y", CLASSES, zipped=zipped),
    )
    image, label = source[2]
    assert (np.asarray(image) == PIXELS[2]).all()
    assert (label, len(source), source.num_classes) == (4, 6, 10)


def test_parts_share_nothing_and_hold_everything(tmp_path: Path) -> None:
    files = _write(tmp_path / "x", PIXELS), _write(tmp_path / "y", CLASSES)
    train, test = (idx(*files, split=split, num_test=2) for split in ("train", "test"))
    found = [np.asarray(source[i][0])[0, 0] for source in (train, test) for i in range(len(source))]
    assert len(train) == 4 and len(test) == 2
    assert sorted(found) == sorted(PIXELS[:, 0, 0])
    for source in (train, test):
        for i in range(len(source)):
            image, label = source[i]
            assert CLASSES[np.asarray(image)[0, 0] // 6] == label


def test_broken_or_unequal_files_are_refused(tmp_path: Path) -> None:
    images, labels = _write(tmp_path / "x", PIXELS), _write(tmp_path / "y", CLASSES)
    with pytest.raises(ValueError, match="is LOWBIT_ASSETS set"):
        idx(str(tmp_path / "none"), labels)
    with pytest.raises(ValueError, match="no IDX file of bytes with 3 axes"):
        idx(labels, labels)
    with pytest.raises(ValueError, match=r"6 images, .* 5 labels"):
        idx(images, _write(tmp_path / "z", CLASSES[:5]))
    with pytest.raises(ValueError, match="num_test 6 must leave some"):
        idx(images, labels, split="test", num_test=6)
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(ValueError, match="no IDX file"):
        idx(images, labels)
