"""Tables of labels: the right image and class of every row, or a line that names the row."""

from pathlib import Path

import datasets
import pytest
from PIL import Image

from qat.data.sources import Source, labelled_folder, parquet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images a/x, a/y and b/x; an image's level says which."""
    for level, name in enumerate(("a/x.png", "a/y.png", "b/x.png")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), level).save(path)
    (tmp_path / "images" / "a" / "._y.png").write_bytes(b"litter of a Mac")
    return tmp_path


def read(root: Path, text: str, num_classes: int | None = None, name: str = "t.tsv") -> Source:
    (root / name).write_bytes(text.encode())
    return labelled_folder(str(root / "images"), str(root / name), num_classes)


def rows(source: Source) -> list[tuple[object, int]]:
    pairs = map(source.__getitem__, range(len(source)))
    return [(image.getpixel((0, 0)), label) for image, label in pairs]


def test_paths_relative_to_the_root_tell_equal_names_apart(root: Path) -> None:
    source = read(root, "file\tclass_index\nb/x.png\t1\na/x.png\t0\ny.png\t2\n")
    assert rows(source) == [(2, 1), (0, 0), (1, 2)]
    assert source.num_classes == 3


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_commas_quotes_and_the_mark_of_a_spreadsheet_are_read(root: Path, start: str) -> None:
    text = f'{start}"file",note,"class_index"\n"a/x.png","one, two",1\n"a/y.png",,0\n'
    assert rows(read(root, text, 2, "t.csv")) == [(0, 1), (1, 0)]


def test_class_names_are_numbered_in_the_order_of_code_points(root: Path) -> None:
    source = read(root, "file,class_name\na/x.png,owl\na/y.png,Zebra\nb/x.png,owl\n")
    assert rows(source) == [(0, 1), (1, 0), (2, 1)]
    assert source.class_names == ("Zebra", "owl")


HEAD = "file\tclass_index\n"
WRONG = {
    "ambiguous": (HEAD + "x.png\t0\n", r"row 2: 'x\.png' may be 'a/x\.png' and 'b/x\.png'; give"),
    "twice": (HEAD + "y.png\t0\na/y.png\t1\n", r"rows 2 and 3: both name 'a/y\.png'"),
    "null": (HEAD + "y.png\t1\na/x.png\t\n", r"row 3: the class index is ''"),
    "short row": (HEAD + "y.png\n", r"row 2: the class index is None"),
    "word": (HEAD + "y.png\tcat\n", r"row 2: the class index is 'cat', expected a whole number"),
    "fraction": (HEAD + "y.png\t1.0\n", r"row 2: the class index is '1\.0'"),
    "negative": (HEAD + "y.png\t-1\n", r"row 2: the class index is '-1'.* from 0 to 2"),
    "too large": (HEAD + "a/x.png\t2\ny.png\t3\n", r"row 3: the class index is '3'.* 0 to 2"),
    "no file": (HEAD + "\t1\n", r"names 1 files not below"),
    "no column": ("path\tclass_index\ny.png\t1\n", r"no column \['file'\], only \['path', 'class"),
    "no classes": ("file\tlabel\ny.png\t1\n", r"no column \['class_index'\].*or 'class_name'"),
    "no name": ("file\tclass_name\ny.png\t \n", r"row 2: the class name is missing"),
    "other count": ("file\tclass_name\ny.png\tcat\n", r"names 1 classes, num_classes is 3"),
    "litter": (HEAD + "._y.png\t1\n", r"names 1 files not below"),
}


@pytest.mark.parametrize("case", WRONG)
def test_row_without_a_clear_image_or_class_is_named(root: Path, case: str) -> None:
    text, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read(root, text, 3)


def test_table_that_is_no_text_is_refused(root: Path) -> None:
    (root / "t.tsv").write_bytes(b"file\tclass_index\n\xff\xfe\t0\n")
    with pytest.raises(ValueError, match=r"label table '.*t\.tsv' cannot be read"):
        labelled_folder(str(root / "images"), str(root / "t.tsv"), 2)


def write_parquet(path: Path, column: list, kind: object) -> Source:
    features = datasets.Features({"image": datasets.Image(decode=False), "label": kind})
    cells = [{"bytes": b"", "path": None}] * len(column)
    table = datasets.Dataset.from_dict({"image": cells, "label": column}, features=features)
    table.to_parquet(path)
    return parquet(str(path))


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `datasets` writes stays out of the home folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "a.parquet"


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ([1, None], datasets.Value("int64"), r"row 1: the class index is None"),
        ([0, -1], datasets.Value("int64"), r"row 1: the class index is -1"),
        ([0.0, 0.5], datasets.Value("float64"), r"row 0: the class index is 0\.0"),
        (["cat", None], datasets.Value("string"), r"row 1: the class name is missing"),
    ],
)
def test_parquet_row_without_a_class_is_named(
    cached: Path, column: list, kind: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_parquet(cached, column, kind)


def test_parquet_has_the_names_it_declares_in_their_order(cached: Path) -> None:
    source = write_parquet(cached, [1, 0], datasets.ClassLabel(names=["owl", "cat"]))
    assert source.class_names == ("owl", "cat")
    words = write_parquet(cached, ["owl", "cat"], datasets.Value("string"))
    assert (words.class_names, list(words.labels)) == (("cat", "owl"), [1, 0])


def test_parquet_image_goes_through_the_one_reader(cached: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet', row 0 cannot be read: it is empty"):
        write_parquet(cached, [0], datasets.Value("int64")).image(0)
