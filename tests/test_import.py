"""What an import costs: nothing heavy before it is used."""

import json
import subprocess
import sys

import pytest

import qat


def _loaded(code: str) -> set[str]:
    """Which heavy packages a program has imported at its end."""
    heavy = ("torch", "timm", "pytorch_lightning", "datasets", "jsonargparse", "numpy")
    listed = f"[name for name in {heavy} if name in sys.modules]"
    program = f"{code}\nimport json, sys\nprint(json.dumps({listed}))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return set(json.loads(found.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import qat",
        "import qat.plan; qat.Plan.uniform(4, 4)",
        "from qat.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    assert _loaded(code) == set()


def test_every_public_name_is_found_and_no_other() -> None:
    assert all(getattr(qat, name) is not None for name in qat.__all__)
    assert set(qat.__all__) == {*qat._HOMES, "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'calibrat'"):
        qat.calibrat  # type: ignore[attr-defined]  # noqa: B018


def test_import_of_a_submodule_leaves_the_function_of_its_name() -> None:
    code = "import qat.calibrate, qat\nassert callable(qat.calibrate), qat.calibrate"
    assert "torch" in _loaded(code)
