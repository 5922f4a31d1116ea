"""What the wheel holds: the packages, their types, and the recipes."""

import subprocess
import sys
import zipfile

import pytest

import qat
from tests import runs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from the files that git knows, so that leftovers of a build do not help."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=runs.ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (runs.ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((runs.ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(target), "."]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
    return zipfile.ZipFile(next(target.glob("*.whl")))


@pytest.mark.slow
def test_wheel_holds_every_module_recipe_and_type_marker(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
    for package in ("qat", "binaryvit", "ptq_init"):
        assert f"{package}/py.typed" in held
        for path in (runs.ROOT / package).rglob("*.py"):
            assert str(path.relative_to(runs.ROOT)) in held
    for path in (runs.ROOT / "configs").rglob("*.yaml"):
        assert f"qat/configs/{path.relative_to(runs.ROOT / 'configs')}" in held


@pytest.mark.slow
def test_wheel_names_its_version_and_its_command(wheel: zipfile.ZipFile) -> None:
    folder = f"lowbit_vit-{qat.__version__}.dist-info"
    assert f"Version: {qat.__version__}" in wheel.read(f"{folder}/METADATA").decode()
    assert "lowbit-vit = qat.cli.main:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert (runs.ROOT / "CITATION.cff").read_text().count(f"version: {qat.__version__}\n") == 1
