"""The examples run as they stand, and stay short."""

import runpy
from pathlib import Path

import pytest
import torch

import qat
from tests import runs

EXAMPLES = runs.ROOT / "examples"


def test_examples_are_short_and_each_is_run_by_a_test() -> None:
    tests = "\n".join(path.read_text() for path in (runs.ROOT / "tests").rglob("test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path.name
        assert path.stem in tests, path.name


def test_model_of_ones_own_is_quantized_saved_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import own_model  # type: ignore[import-not-found] - beside the package

    own_model.main(str(tmp_path))
    top1 = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(top1) == 3 and top1[0] > 0.6 and top1[1] > top1[0] - 0.2
    assert abs(top1[2] - top1[1]) < 0.02  # the odd value between two codes may fall to either side
    with pytest.raises(ValueError, match="trust"):
        qat.load(tmp_path / "mixer.ckpt")


def test_guarded_stream_names_its_broken_image_and_goes_on_after_an_end(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(EXAMPLES / "guard_stream.py"))["main"]
    main(str(teacher), str(tmp_path / "state"), count=4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "nan" in lines[2].lower()
    main(str(teacher), str(tmp_path / "state"), count=1)
    assert capsys.readouterr().out.startswith("continued after 4 batches")


@pytest.mark.slow
def test_flips_of_a_binary_model_are_watched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / "watch_flips.py"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 3 and all("flip rate 0.0" in line for line in lines)
