"""Nothing is silent: what a user gets wrong ends the program with one clear line."""

import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import qat
from qat import Plan
from qat.checkpoint import read
from qat.cli.main import main
from qat.quantizers import LSQ
from tests import runs

FLOAT = "configs/digits_teacher.yaml"
W4A4 = "configs/qat/digits_w4a4_lsq.yaml"
ONE_STEP = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1)

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail, and returns its only line of error output."""

    def run(*words: object) -> str:
        status = runs.run(*map(str, words))
        output = capsys.readouterr()
        assert status != 0, output.out[-2000:]
        lines = output.err.splitlines()
        assert len(lines) == 1, output.err
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _plan(tmp_path: Path, *rules: dict[str, Any]) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(list(rules)))
    return path


def test_recipe_may_name_a_module_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever program was called; modules of that folder hide no others."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    Path("working_folder_part.py").write_text("import qat\n\nmade = qat.timm_model\n")
    Path("yaml.py").write_text("raise RuntimeError\n")
    recipe = yaml.safe_load((runs.ROOT / FLOAT).read_text())
    recipe["model"]["model"]["class_path"] = "working_folder_part.made"
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["plan", "--config", "recipe.yaml"]) == 0
    assert "blocks.0.attn.qkv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sed_everything": 3}, r"'sed_everything'.*did you mean 'seed_everything'\?"),
        ({"modle": {"x": 1}}, r"'modle(\.x)?'; did you mean 'model'\?"),
        ({"modle": {}}, r"'modle'; did you mean 'model'\?"),
        ({"trainer": {"max_epoch": 3}}, r"trainer\.max_epoch'.*'trainer\.max_epochs'\?"),
        ({"model": {"techer": "x"}}, r"'model\.techer'.*did you mean 'model\.teacher'\?"),
        ({"data": {"batchsize": 3}}, r"'data\.batchsize'.*did you mean 'data\.batch_size'\?"),
        ({"model": {"optimizer": {"init_args": {"lrr": 1}}}}, r"model\.optimizer.*'lrr'"),
        ({"model": {"objective": {"sfot": 1.0}}}, r"model\.objective\.sfot"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unknown_key_of_a_recipe_is_refused_with_the_nearest_one(
    changes: dict[str, Any], message: str, refused: Refused, tmp_path: Path
) -> None:
    recipe = runs.write_recipe(tmp_path / "recipe.yaml", **changes)
    line = refused("fit", "--config", recipe, "--run_dir", tmp_path / "run", *ONE_STEP)
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--trainer.max_epoch", r"did you mean 'trainer\.max_epochs'\?"),
        ("--sed_everything", r"did you mean 'seed_everything'\?"),
        ("--model.techer", r"did you mean 'model\.teacher'\?"),
        ("--run_dirr", r"did you mean 'run_dir'\?"),
    ],
)
def test_unknown_option_is_refused_with_the_nearest_one(
    word: str, message: str, refused: Refused
) -> None:
    line = refused("fit", "--config", FLOAT, word, 3)
    assert word in line and re.search(message, line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stream.num_images", "few"), r"\"stream\.num_images\": Expected a .*int.*: few$"),
        (("--guard", "qat.tta.Gard"), r"^error: guard: .*'Gard'; did you mean 'Guard'\?$"),
        (("--guard", "Gard"), r"^error: guard: nothing is called 'Gard'; did you mean 'Guard'\?$"),
        (("--trainer.logger", "WandbLoger"), r"trainer\.logger: .*did you mean 'WandbLogger'\?$"),
        (
            ("--trainer.logger", "pytorch_lightning.loggers.WandbLoger"),
            r"trainer\.logger: 'pytorch_lightning\.loggers' has no 'WandbLoger'; did you mean",
        ),
        (("--trainer.callbacks+=EarlyStoping",), "did you mean 'EarlyStopping'\\?$"),
        (("--stream.protocol", "Continul"), "is called 'Continul'; give its path, such as module"),
        (("--guard.weight", "-1"), r"^error: a guard needs a weight above 0.*got -1"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_value_that_an_optional_setting_refuses_is_told_without_its_alternatives(
    words: tuple[str, str], message: str, refused: Refused, tmp_path: Path
) -> None:
    recipe = runs.ROOT / "configs/tta/digits.yaml"
    line = refused("adapt", "--config", recipe, "--run_dir", tmp_path / "run", *words)
    assert re.search(message, line) and "NoneType" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", ["--seed", "--trainer.max_epo", "--run", "--require_cov"])
def test_abbreviated_option_is_refused(word: str, refused: Refused) -> None:
    assert f"unrecognized arguments: {word}" in refused("fit", "--config", FLOAT, word, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fitt",), r"there is no command 'fitt'; did you mean 'fit'\?$"),
        (("plan", "--config", "ptq/seconds"), r"no images: give --images DIR .*--data DIR"),
        (("reproduce",), r"name a row of benchmarks/ledger\.yaml"),
        (("fit", "--config", "configs/defualt.yaml"), r"no recipe .*configs/default\.yaml"),
        (("fit", "--config", FLOAT, "--trainer.max_epochs", "many"), r"max_epochs.*many"),
        (("fit", "--config", FLOAT, "--model.optimizer", "torch.optim.Adan"), "Adan"),
        (
            ("fit", "--config", W4A4, "--init", "ptq_init.repq_vit.RepQVit"),
            r"'ptq_init\.repq_vit' has no 'RepQVit'; did you mean 'RepQViT'\?",
        ),
        (("fit", "--config", FLOAT, "--data.augment", "{colour: 1}"), r"data\.augment.*colour"),
        (("fit", "--config", FLOAT, "--model.objective.temperature", 0), "must be positive"),
        (("fit", "--config", FLOAT, "--data.batch_size", 2000), "exceeds the 1437 training"),
        (("fit", "--config", FLOAT, "--model.plan", "gone.yaml"), "no plan file 'gone.yaml'"),
        (("fit", "--config", FLOAT, "--model.teacher", "gone.ckpt"), "no checkpoint 'gone.ckpt'"),
        (("fit", "--config", W4A4, "--teacher_config", "gone.yaml"), "no recipe 'gone.yaml'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value[-2:])),
)
def test_value_that_cannot_be_used_is_refused_by_name(
    words: tuple[object, ...], message: str, refused: Refused, tmp_path: Path
) -> None:
    run_dir = ("--run_dir", tmp_path / "run") if len(words) > 1 else ()
    assert re.search(message, refused(*words, *run_dir))


def test_plan_pattern_that_matches_nothing_is_refused_with_the_nearest_names(
    refused: Refused, tmp_path: Path
) -> None:
    path = _plan(tmp_path, {"pattern": "block.*", "weight": {"bits": 4}})
    line = refused("fit", "--config", FLOAT, "--model.plan", path, "--run_dir", tmp_path / "run")
    assert re.search(r"'block\.\*' matches no quantizable layer; nearest names: .*blocks\.0", line)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (99, r"bits must be 1 to 16, got 99"),
        (0, r"bits must be 1 to 16, got 0"),
        (1, r"blocks\.0\.attn\.qkv: LSQ offers 2 to 16 bits, got 1"),
        ("four", r"weight needs a spec such as \{bits: 4\}"),
    ],
)
def test_bit_width_that_no_quantizer_offers_is_refused(
    bits: object, message: str, refused: Refused, tmp_path: Path
) -> None:
    path = _plan(tmp_path, {"pattern": "blocks.*", "weight": {"bits": bits}})
    line = refused("fit", "--config", FLOAT, "--model.plan", path, "--run_dir", tmp_path / "run")
    assert re.search(message, line)


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model.model.init_args.num_classes", 7), "model has 7 classes, the data has 10"),
        (("--data.img_size", 16), r"expects input_size \(1, 8, 8\).*remove the data\.img_size"),
        (("--data.mean", "[0.485]"), r"expects mean.*uses \(0\.485,\).*remove the data\.mean"),
        (("--data.std", "[0.229]"), r"expects std.*uses \(0\.229,\).*remove the data\.std"),
        (("--data.mean", "[0.485,0.456,0.406]"), r"data\.mean"),
        (("--data.interpolation", "bilinear"), r"remove the data\.interpolation"),
    ],
    ids=lambda value: f"{value[0]}-{value[1]}" if isinstance(value, tuple) else "",
)
def test_data_that_disagrees_with_the_model_is_refused(
    command: str, words: tuple[object, ...], message: str, refused: Refused, tmp_path: Path
) -> None:
    line = refused(command, "--config", FLOAT, *words, "--run_dir", tmp_path / "run")
    assert re.search(message, line)


@pytest.mark.parametrize("what", ["model", "conversion"])
def test_checkpoint_of_another_model_is_refused_on_resume(
    what: str, teacher: Path, lsq_run: Path, refused: Refused, tmp_path: Path
) -> None:
    if what == "model":
        changes = {"init_args": {"model_args": {"depth": 2}}}
        recipe = runs.write_recipe(tmp_path / "recipe.yaml", model={"model": changes})
        words: tuple[object, ...] = ("--config", recipe, "--ckpt_path", teacher)
        found = "model_args depth is 3 there and 2 here"
    else:
        path = _plan(tmp_path, {"pattern": "blocks.*", "weight": {"bits": 3}, "input": {"bits": 3}})
        words = ("--config", W4A4, "--model.teacher", teacher, "--model.plan", path)
        words += ("--ckpt_path", lsq_run / "checkpoints" / "last.ckpt")
        found = "plan is .*there and .*here"
    line = refused("fit", *words, "--run_dir", tmp_path / "run")
    assert re.search(f"holds another {what} than the recipe asks for: {found}", line)


@pytest.mark.parametrize("what", ["model", "plan"])
def test_checkpoint_of_another_model_than_the_recipe_states_is_refused_on_test(
    what: str, teacher: Path, lsq_run: Path, refused: Refused, tmp_path: Path
) -> None:
    other = {
        "model": {"model": {"init_args": {"model_args": {"depth": 2}}}},
        "plan": {"plan": "configs/plans/vit_binary.yaml"},
    }
    recipe = runs.write_recipe(tmp_path / "recipe.yaml", model=other[what])
    checkpoint = teacher if what == "model" else lsq_run / "checkpoints" / "last.ckpt"
    words = ("--config", recipe, "--ckpt_path", checkpoint, "--run_dir", tmp_path / "run")
    assert str(checkpoint) in refused("test", *words)


def _damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
        return
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
        at = bytes(content).index(archive.read(record))
    content[at + record.file_size // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_damaged_checkpoint_is_refused_and_left_as_it_is(
    command: str, kind: str, teacher: Path, refused: Refused, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(teacher.parents[1], folder)
    path = folder / "checkpoints" / "last.ckpt"
    _damage(path, kind)
    before = _files(folder)
    run_dir = folder if command == "fit" else tmp_path / "test"
    named = "last" if command == "fit" else path
    line = refused(command, "--config", FLOAT, "--ckpt_path", named, "--run_dir", run_dir)
    assert re.search(r"last\.ckpt' is truncated or damaged", line)
    assert _files(folder) == before


def test_damaged_teacher_is_refused(teacher: Path, refused: Refused, tmp_path: Path) -> None:
    path = shutil.copy(teacher, tmp_path / "teacher.ckpt")
    _damage(path, "flipped")
    line = refused("fit", "--config", W4A4, "--model.teacher", path, "--run_dir", tmp_path / "run")
    assert "is truncated or damaged" in line


def test_test_of_a_plan_without_a_checkpoint_is_refused(refused: Refused, tmp_path: Path) -> None:
    line = refused("test", "--config", W4A4, "--run_dir", tmp_path / "run")
    assert "the recipe has a plan, but without --ckpt_path" in line


def test_test_of_a_plan_with_a_float_checkpoint_is_refused(
    teacher: Path, refused: Refused, tmp_path: Path
) -> None:
    words = ("--config", W4A4, "--ckpt_path", teacher, "--run_dir", tmp_path / "run")
    line = refused("test", *words)
    assert re.search(r"the recipe has a plan, but checkpoint '.*' holds a float model", line)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("config", [FLOAT, W4A4])
def test_test_of_a_checkpoint_that_was_never_calibrated_is_refused(
    config: str, teacher: Path, refused: Refused, tmp_path: Path
) -> None:
    model = qat.load(teacher)
    qat.convert_(model, Plan.load(runs.ROOT / "configs/plans/vit_w4a4.yaml"), LSQ)
    qat.save(model, tmp_path / "idle.ckpt")
    words = ("--ckpt_path", tmp_path / "idle.ckpt", "--run_dir", tmp_path / "run")
    line = refused("test", "--config", config, *words)
    assert re.search(r"idle\.ckpt' is converted but not calibrated: blocks\.0\.attn\.qkv", line)


def test_test_of_nothing_is_refused(refused: Refused, tmp_path: Path) -> None:
    line = refused("test", "--config", FLOAT, "--model.model", "null", "--run_dir", tmp_path)
    assert "nothing to test" in line


@pytest.mark.parametrize("command", ["fit", "test"])
def test_folder_that_holds_a_run_is_refused_and_untouched(
    command: str, teacher: Path, refused: Refused
) -> None:
    folder = teacher.parents[1]
    before = _files(folder)
    line = refused(command, "--config", FLOAT, "--run_dir", folder, *ONE_STEP)
    assert f"run folder '{folder}' already holds a run" in line
    assert _files(folder) == before


def test_last_without_a_run_is_refused_and_makes_no_folder(
    refused: Refused, tmp_path: Path
) -> None:
    words = ("--ckpt_path", "last", "--run_dir", tmp_path / "run")
    assert "no checkpoint to continue in" in refused("fit", "--config", FLOAT, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("term", ["soft", "feature"])
def test_objective_that_needs_a_teacher_is_refused_without_one(
    term: str, refused: Refused, tmp_path: Path
) -> None:
    words = (f"--model.objective.{term}", 1, "--run_dir", tmp_path / "run")
    line = refused("fit", "--config", FLOAT, *words)
    assert "soft or feature term but there is no teacher" in line


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_coverage_below_the_required_one_fails_with_status_1(
    command: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--config", W4A4, "--model.teacher", teacher, "--run_dir", tmp_path / "run")
    assert runs.run(command, *words, "--require_coverage", 0.999) == 1
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert re.search(r"error: coverage is 0\.99\d+ of the MACs, below the required 0\.999", line)
    assert "not below 16 bits: patch_embed.proj" in output.out
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_coverage_that_suffices_passes(teacher: Path, tmp_path: Path) -> None:
    words = ("--model.teacher", teacher, "--require_coverage", 0.99, *ONE_STEP)
    assert runs.fit(W4A4, tmp_path / "run", *words)["coverage_macs"] >= 0.99


def test_student_and_teacher_of_different_image_size_are_refused(
    teacher: Path, refused: Refused, tmp_path: Path
) -> None:
    words = ("--model.teacher", teacher, "--model.objective.soft", 1)
    size = ("--model.model.init_args.img_size", 16)
    line = refused("fit", "--config", FLOAT, *words, *size, "--run_dir", tmp_path / "run")
    assert re.search(r"disagree on preprocessing: .*\(1, 16, 16\).*\(1, 8, 8\)", line)


def test_regularizer_of_binary_weights_is_refused_for_a_model_without_any(
    teacher: Path, refused: Refused, tmp_path: Path
) -> None:
    grs = {"class_path": "binaryvit.grs.GRS"}
    grs["init_args"] = {"form": "binaryvit.grs.DistancePull"}  # type: ignore[assignment]
    recipe = runs.write_recipe(tmp_path / "recipe.yaml", W4A4, model={"regularizer": grs})
    words = ("--config", recipe, "--model.teacher", teacher, *ONE_STEP)
    line = refused("fit", *words, "--run_dir", tmp_path / "run")
    assert "GRS acts on binary weights and the model has none" in line


def test_flag_wins_over_the_recipe_and_reaches_the_run(teacher: Path, tmp_path: Path) -> None:
    words = (*ONE_STEP, "--seed_everything", 5, "--data.batch_size", 32)
    found = runs.fit(FLOAT, tmp_path / "run", *words)
    assert (found["seed"], found["epochs"]) == (5, 1)
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["data"]["batch_size"] == 32


def test_later_recipe_on_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 1, limit_train_batches: 2}")
    found = runs.fit(FLOAT, tmp_path / "run", "--config", tmp_path / "more.yaml")
    assert found["epochs"] == 1
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_plan_command_touches_no_data_and_writes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {"class_path": "qat.data.sources.parquet", "init_args": {"path": "/gone.parquet"}}
    recipe = runs.write_recipe(tmp_path / "recipe.yaml", W4A4, data={"train": gone, "val": gone})
    before = sorted(tmp_path.iterdir())
    assert runs.run("plan", "--config", recipe, "--run_dir", tmp_path / "run") == 0
    assert "w4a4" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("words", [("--help",), ("fit", "--help"), ("test", "--help")])
def test_help_ends_with_status_0(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        runs.run(*words) if words[0] == "--help" else main(words)
    assert caught.value.code == 0
    assert "usage: train.py" in capsys.readouterr().out
