"""Every recipe parses, every plan applies, every recipe whose data is at hand trains."""

import os
import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

import qat
from qat import Plan
from qat.cli.grid import choices
from qat.cli.main import make_parser
from qat.cli.recipe import load_recipe
from qat.plan import load_plan
from qat.quantizers import Affine, DynamicToken, PerOperand, quantizers
from tests import runs
from tests.qat.diffusion.common import tiny_dit

CONFIGS = runs.ROOT / "configs"
PLANS = sorted((CONFIGS / "plans").glob("*.yaml"))
PARTS = sorted(CONFIGS.glob("*/parts/*.yaml"))
RECIPES = sorted(set(CONFIGS.rglob("*.yaml")) - set(PLANS) - set(PARTS))
NEEDY = [path for path in RECIPES if "LOWBIT_ASSETS" in path.read_text()]
NEEDY += sorted(set(CONFIGS.glob("dit/mnist_w*.yaml")))
NEEDY += [path for path in RECIPES if path not in NEEDY and "cifar10" in path.name]
AT_HAND = [path for path in RECIPES if path not in NEEDY and "imagenet" not in path.name]
AT_HAND = [path for path in AT_HAND if path.parent.name not in ("ptq", "dit", "tta")]
AT_HAND = [path for path in AT_HAND if "val" in load_recipe(path).get("data", {})]
PHOTOS = ("--data.val", '{"class_path": "qat.data.sources.digits", "init_args": {"split": "test"}}')
"""Images for a recipe that leaves them to the user."""
COMMANDS = {"ptq": "quantize", "dit": "quantize", "pmq": "search", "tta": "adapt"}
needs_assets = pytest.mark.skipif("LOWBIT_ASSETS" not in os.environ, reason="no LOWBIT_ASSETS")


def _name(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.fixture
def _dummy_folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("LOWBIT_ASSETS", "IMAGENET"):
        monkeypatch.setenv(name, "/nowhere")
    yield


def test_there_are_recipes_and_plans_to_try() -> None:
    assert {"default.yaml", "digits_teacher.yaml"} <= {_name(path) for path in AT_HAND}
    assert len(NEEDY) >= 4 and len(PLANS) >= 2


@pytest.mark.usefixtures("_dummy_folders")
@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_recipe_is_accepted_by_the_parser_and_every_value_arrives(path: Path) -> None:
    parser = make_parser(COMMANDS.get(path.parent.name, "fit"))
    recipe = load_recipe(path)
    data = recipe.get("data", {})
    config = parser.parse_args(["--config", str(path), *(() if "val" in data else PHOTOS)])
    assert config.trainer.max_epochs == recipe.get("trainer", {}).get("max_epochs")
    assert config.model.plan == recipe["model"].get("plan")
    assert config.data.batch_size == data.get("batch_size", 64)


@pytest.mark.usefixtures("_dummy_folders")
@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_files_that_a_recipe_names_in_the_repository_exist(path: Path) -> None:
    recipe = load_recipe(path)
    for name in (recipe.get("teacher_config"), recipe.get("judge_config")):
        assert name is None or Path(name).is_file()
    chosen = [part for _, part in choices(recipe.get("grid", {}))]
    for plan in (part.get("model", {}).get("plan") for part in (recipe, *chosen)):
        assert plan is None or load_plan(plan)


@pytest.mark.parametrize("path", [p for p in PLANS if p.stem.startswith("dit")], ids=_name)
def test_plan_of_a_dit_quantizes_the_layers_of_its_blocks(path: Path) -> None:
    model = tiny_dit()
    qat.convert_(model, Plan.load(path), PerOperand(input=DynamicToken))
    found = {name: (q.operand, q.spec.bits) for name, q in quantizers(model)}
    weight, activation = (int(word) for word in re.findall(r"\d", path.stem))
    assert len(found) == 2 * 2 * 4
    assert set(found.values()) == {("weight", weight), ("input", activation)}


@pytest.mark.parametrize(
    "path", [p for p in PLANS if not p.stem.startswith(("dit", "resnet"))], ids=_name
)
def test_plan_applies_to_a_vit_without_an_idle_rule(path: Path, tiny_vit, images) -> None:
    if "binary" in path.name:
        from binaryvit import BinaryQuantizers

        conversion = qat.convert_(tiny_vit, Plan.load(path), BinaryQuantizers())
    else:
        conversion = qat.convert_(tiny_vit, Plan.load(path), Affine)
    assert conversion.plan == Plan.load(path)
    bits = {quantizer.spec.bits for _, quantizer in quantizers(tiny_vit)}
    named = {int(width) for width in re.findall(r"\d", path.stem)}
    assert bits == named | ({1} if "binary" in path.name else set())
    qat.calibrate(tiny_vit, [images])
    assert tiny_vit(images).isfinite().all()


@pytest.mark.parametrize("path", AT_HAND, ids=_name)
def test_recipe_whose_data_is_at_hand_survives_a_tiny_fit(
    path: Path, teacher: Path, tmp_path: Path
) -> None:
    distilled = "teacher_config" in load_recipe(path)
    taught = ("--model.teacher", teacher) if distilled else ()
    limits = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 2)
    found = runs.fit(path, tmp_path / "run", *taught, *limits)
    assert 0 < found["top1"] <= 1
    assert ("top1_teacher" in found) == distilled
    qat.load(tmp_path / "run" / "checkpoints" / "last.ckpt")


@needs_assets
@pytest.mark.parametrize("path", NEEDY, ids=_name)
def test_recipe_that_needs_assets_is_planned(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = runs.run("plan", "--config", path)
    shown = capsys.readouterr()
    assert (status, shown.err) == (0, "")
    precision = {"binary": "w1a1", "w4a4": "w4a4"} if "teacher" not in path.name else {}
    kind = "binary" if "student" in path.name else "w4a4" if "w4a4" in path.name else ""
    assert precision.get(kind, "float") in shown.out
    assert "training memory at batch" in shown.out


def test_recipe_of_the_imagenet_folder_is_planned_without_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = runs.run("plan", "--config", CONFIGS / "binaryvit" / "deit_small_imagenet.yaml")
    shown = capsys.readouterr()
    assert (status, shown.err) == (0, "")
    assert "w1a1" in shown.out


@pytest.mark.slow
@needs_assets
def test_cifar_recipe_survives_one_batch(tmp_path: Path) -> None:
    path = CONFIGS / "binaryvit" / "cifar10_vit_tiny_teacher.yaml"
    limits = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 0.001)
    limits += (
        "--trainer.limit_val_batches",
        0.005,
        "--data.batch_size",
        8,
        "--data.num_workers",
        0,
    )
    found = runs.fit(path, tmp_path / "run", *limits)
    assert 0 <= found["top1"] <= 1


@pytest.mark.usefixtures("_dummy_folders")
def test_recipes_work_from_any_working_directory(tmp_path: Path) -> None:
    with chdir(tmp_path):
        for path in RECIPES:
            test_files_that_a_recipe_names_in_the_repository_exist(path)
