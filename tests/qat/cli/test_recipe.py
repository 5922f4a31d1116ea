"""Recipes: how they build on each other, what they may refer to, what is refused."""

import random
import sys
from pathlib import Path

import pytest
import yaml

from qat.cli.grid import choices
from qat.cli.main import COMMANDS, main, make_parser
from qat.cli.recipe import OF_SOME_COMMANDS, SHIPPED, find, load_recipe


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_recipe_without_base_is_its_own_yaml(tmp_path: Path) -> None:
    text = "a: 1\nb: {c: [1, 2], d: null}\n"
    assert load_recipe(_write(tmp_path / "r.yaml", text)) == yaml.safe_load(text)


def test_base_merges_key_by_key_and_the_recipe_wins(tmp_path: Path) -> None:
    _write(tmp_path / "below.yaml", "a: {x: 1, y: {p: 1, q: 2}}\nb: kept")
    recipe = _write(tmp_path / "r.yaml", "base: below.yaml\na: {y: {q: 3}}\nc: new")
    expected = {"a": {"x": 1, "y": {"p": 1, "q": 3}}, "b": "kept", "c": "new"}
    assert load_recipe(recipe) == expected


def test_base_may_be_the_name_of_a_recipe_that_comes_with_the_package(tmp_path: Path) -> None:
    recipe = _write(tmp_path / "r.yaml", "base: ptq/digits\nmodel: {plan: w8a8}")
    shipped = load_recipe("ptq/digits")
    assert load_recipe(recipe) == shipped | {"model": shipped["model"] | {"plan": "w8a8"}}


def test_later_base_wins_over_an_earlier_one(tmp_path: Path) -> None:
    _write(tmp_path / "one.yaml", "a: 1\nb: 1\nc: 1")
    _write(tmp_path / "two.yaml", "b: 2\nc: 2")
    recipe = _write(tmp_path / "r.yaml", "base: [one.yaml, two.yaml]\nc: 3")
    assert load_recipe(recipe) == {"a": 1, "b": 2, "c": 3}


def test_lists_and_null_replace_what_is_below(tmp_path: Path) -> None:
    _write(tmp_path / "below.yaml", "a: [1, 2, 3]\nb: {x: 1}")
    recipe = _write(tmp_path / "r.yaml", "base: below.yaml\na: [4]\nb: null")
    assert load_recipe(recipe) == {"a": [4], "b": None}


def test_another_class_path_replaces_the_whole_mapping(tmp_path: Path) -> None:
    _write(tmp_path / "below.yaml", "m: {class_path: A, init_args: {x: 1}}")
    other = _write(tmp_path / "o.yaml", "base: below.yaml\nm: {class_path: B, init_args: {y: 2}}")
    same = _write(tmp_path / "s.yaml", "base: below.yaml\nm: {class_path: A, init_args: {y: 2}}")
    none = _write(tmp_path / "n.yaml", "base: below.yaml\nm: {init_args: {y: 2}}")
    both = {"m": {"class_path": "A", "init_args": {"x": 1, "y": 2}}}
    assert load_recipe(other) == {"m": {"class_path": "B", "init_args": {"y": 2}}}
    assert load_recipe(same) == load_recipe(none) == both


def test_later_files_are_laid_over_earlier_ones_before_any_is_parsed(tmp_path: Path) -> None:
    method = _write(tmp_path / "a.yaml", "m: {class_path: A, init_args: {x: 1}}\nn: 1")
    length = _write(tmp_path / "b.yaml", "m: {init_args: {y: 2}}\nn: 2")
    both = {"m": {"class_path": "A", "init_args": {"x": 1, "y": 2}}, "n": 2}
    assert load_recipe(method, length) == both


def test_lists_of_a_grid_keep_the_order_of_the_recipe(tmp_path: Path) -> None:
    grid = {"method": ["m.yaml"], "length": ["l.yaml"], "bits": ["b.yaml"]}
    recipe = {"base": str(Path("configs/default.yaml").resolve()), "grid": grid}
    path = _write(tmp_path / "r.yaml", yaml.safe_dump(recipe, sort_keys=False))
    parser = make_parser("quantize")
    parsed = parser.parse_args(["--config", str(path)])
    assert list(parsed.grid) == list(grid)


def test_bases_are_relative_to_the_recipe_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "a" / "deep" / "bottom.yaml", "x: 1")
    _write(tmp_path / "a" / "middle.yaml", "base: deep/bottom.yaml\ny: 2")
    recipe = _write(tmp_path / "b" / "r.yaml", "base: ../a/middle.yaml\nz: 3")
    monkeypatch.chdir("/")
    assert load_recipe(recipe) == {"x": 1, "y": 2, "z": 3}


def test_path_is_tried_relative_to_the_recipe_and_left_alone_where_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/plans/mine.yaml", "a/photos/x.png", "a/train/x.png"):
        _write(tmp_path / name, "")
    text = """
    model: {plan: plans/mine.yaml, teacher: elsewhere/last.ckpt}
    data: {root: photos, split: train, list: [./photos, torch/cifar10]}
    """
    recipe = _write(tmp_path / "a" / "r.yaml", text)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a"
    assert load_recipe(recipe) == {
        "model": {"plan": str(folder / "plans/mine.yaml"), "teacher": "elsewhere/last.ckpt"},
        "data": {
            "root": str(folder / "photos"),
            "split": "train",
            "list": [str(folder / "photos"), "torch/cifar10"],
        },
    }


@pytest.mark.parametrize(
    "key", ["teacher_config", "judge_config", "teacher", "plan", "weights", "like", "latency_table"]
)
def test_file_beside_the_recipe_is_found_from_any_folder_whatever_key_names_it(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "a" / "mine.file", "")
    recipe = _write(tmp_path / "a" / "r.yaml", f"{key}: mine.file\nnote: mine.file")
    monkeypatch.chdir("/")
    found = load_recipe(recipe)
    assert found == {key: str(tmp_path / "a" / "mine.file"), "note": "mine.file"}
    other = _write(tmp_path / "b" / "r.yaml", f"{key}: mine.file")
    assert load_recipe(other) == {key: "mine.file"}  # then the working directory


def test_base_that_is_not_beside_the_recipe_is_taken_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "here" / "below.yaml", "x: 1")
    recipe = _write(tmp_path / "there" / "r.yaml", "base: below.yaml\ny: 2")
    monkeypatch.chdir(tmp_path / "here")
    assert load_recipe(recipe) == {"x": 1, "y": 2}
    _write(tmp_path / "there" / "below.yaml", "x: 3")
    assert load_recipe(recipe) == {"x": 3, "y": 2}


def test_choices_of_a_grid_are_files_or_settings_and_may_build_on_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "parts" / "m.yaml", "m: {class_path: M, init_args: {x: 1}}")
    text = """
    grid:
      bits: {w4a4: {plan: w4a4}, w8a8: {plan: w8a8}}
      method:
        plain: parts/m.yaml
        more: {base: parts/m.yaml, m: {init_args: {y: 2}}}
      length: [parts/m.yaml]
    """
    recipe = _write(tmp_path / "r.yaml", text)
    monkeypatch.chdir("/")
    found = {"-".join(names.values()): part for names, part in choices(load_recipe(recipe)["grid"])}
    assert list(found) == ["w4a4-plain-m", "w4a4-more-m", "w8a8-plain-m", "w8a8-more-m"]
    assert found["w8a8-plain-m"] == {
        "plan": "w8a8",
        "m": {"class_path": "M", "init_args": {"x": 1}},
    }
    assert found["w4a4-more-m"]["m"]["init_args"] == {"x": 1, "y": 2}


def test_sections_of_some_commands_are_those_of_their_parsers() -> None:
    known = [{a.dest.split(".")[0] for a in make_parser(name)._actions} for name in COMMANDS]
    keys = [names for names in known if "config" in names]
    assert set.union(*keys) - set.intersection(*keys) == OF_SOME_COMMANDS


@pytest.mark.parametrize("length", [1, 2, 3])
def test_cycle_is_refused(length: int, tmp_path: Path) -> None:
    for i in range(length):
        _write(tmp_path / f"{i}.yaml", f"base: {(i + 1) % length}.yaml")
    with pytest.raises(ValueError, match=r"recipe '.*0\.yaml' builds on itself"):
        load_recipe(tmp_path / "0.yaml")


def test_base_that_two_bases_share_is_no_cycle(tmp_path: Path) -> None:
    _write(tmp_path / "root.yaml", "a: 1")
    _write(tmp_path / "left.yaml", "base: root.yaml\nb: 1")
    _write(tmp_path / "right.yaml", "base: root.yaml\nc: 1")
    recipe = _write(tmp_path / "r.yaml", "base: [left.yaml, right.yaml]")
    assert load_recipe(recipe) == {"a": 1, "b": 1, "c": 1}


def test_missing_recipe_lists_what_the_folder_holds(tmp_path: Path) -> None:
    _write(tmp_path / "present.yaml", "a: 1")
    with pytest.raises(ValueError, match=r"no recipe '.*absent\.yaml'.*holds .*present\.yaml"):
        load_recipe(tmp_path / "absent.yaml")
    recipe = _write(tmp_path / "r.yaml", "base: gone/absent.yaml")
    with pytest.raises(ValueError, match=r"no recipe '.*gone/absent\.yaml'; recipes are in"):
        load_recipe(recipe)


@pytest.mark.parametrize(("text", "kind"), [("- 1", "list"), ("word", "str"), ("", "NoneType")])
def test_recipe_that_is_no_mapping_is_refused(text: str, kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"must be a mapping, got {kind}"):
        load_recipe(_write(tmp_path / "r.yaml", text))


def test_file_that_is_no_yaml_is_refused_by_name(tmp_path: Path) -> None:
    broken = _write(tmp_path / "broken.yaml", "a: [1")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (broken, binary):
        with pytest.raises(ValueError, match=rf"recipe '.*{path.name}' is no YAML"):
            load_recipe(path)


@pytest.mark.parametrize("base", ["3", "{a: 1}", "[[x.yaml]]"])
def test_base_that_is_no_list_of_files_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base"):
        load_recipe(_write(tmp_path / "r.yaml", f"base: {base}"))


def test_environment_variable_that_is_unset_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOWBIT_TEST_UNSET", raising=False)
    recipe = _write(tmp_path / "r.yaml", "run_dir: ${oc.env:LOWBIT_TEST_UNSET}/x")
    with pytest.raises(ValueError, match=r"r\.yaml.*LOWBIT_TEST_UNSET") as caught:
        load_recipe(recipe)
    assert "\n" not in str(caught.value)
    assert main(["fit", "--config", str(recipe)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "LOWBIT_TEST_UNSET" in line


def test_assets_folder_that_is_unset_comes_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOWBIT_ASSETS", raising=False)
    recipe = _write(tmp_path / "r.yaml", "run_dir: ${oc.env:LOWBIT_ASSETS}/x")
    with pytest.raises(ValueError, match=r"LOWBIT_ASSETS.*set it to the folder of the assets"):
        load_recipe(recipe)


def test_environment_and_keys_of_the_recipe_are_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_TEST_SET", "/data")
    _write(tmp_path / "below.yaml", "a: {b: 3}\npath: '${oc.env:LOWBIT_TEST_SET}/${a.b}'")
    recipe = _write(
        tmp_path / "r.yaml", "base: below.yaml\na: {b: 4}\nc: ${a.b}\nd: '${oc.env:NOT_SET,x}'"
    )
    expected = {"a": {"b": 4}, "path": "/data/4", "c": 4, "d": "x"}
    assert load_recipe(recipe) == expected


def test_reference_to_a_missing_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe '.*r\.yaml'.*no_such"):
        load_recipe(_write(tmp_path / "r.yaml", "a: ${no_such.key}"))


@pytest.mark.parametrize("name", ["ptq/imagenet_vit_tiny_w4a4_repq", "default", "default.yaml"])
def test_shipped_recipe_is_found_by_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(name) == SHIPPED / f"{name.removesuffix('.yaml')}.yaml"


def test_file_of_the_user_goes_before_a_shipped_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "default.yaml", "a: 1")
    assert load_recipe("default") == {"a": 1}


def test_misspelt_recipe_is_answered_by_the_shipped_one() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'ptq/imagenet_vit_tiny_w4a4_repq'\?"):
        load_recipe("ptq/imagenet_vit_tiny_w4a4_repqq")


def test_settings_of_a_grid_stay_plain_data_until_they_are_laid_over_the_recipe(
    tmp_path: Path,
) -> None:
    """Parsed on their own they would take the defaults of components, which nobody asked for."""
    grid = "grid: {method: {mgrq: {base: ptq/parts/mgrq}}}"
    recipe = _write(tmp_path / "r.yaml", f"base: ptq/digits\n{grid}")
    parsed = make_parser("quantize").parse_args(["--config", str(recipe)])
    assert parsed.grid == load_recipe(recipe)["grid"]
    assert parsed.grid["method"]["mgrq"]["model"]["quantizer"]["init_args"] == {
        "attention": "qat.quantizers.TanQ"
    }


@pytest.mark.parametrize("grid", ["[a.yaml]", "{bits: a.yaml}", "{bits: [1]}", "{bits: {a: 4}}"])
def test_grid_that_is_no_mapping_of_axes_is_refused(
    grid: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "--config", "ptq/digits", "--grid", grid]) == 2
    assert "a grid is a mapping" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["os.system", "antigravity.geohash", "subprocess.Popen"])
def test_class_of_python_itself_is_refused_before_it_is_imported(name: str, tmp_path: Path) -> None:
    recipe = _write(tmp_path / "r.yaml", f"model: {{quantizer: {{class_path: {name}}}}}")
    with pytest.raises(ValueError, match=rf"class_path '{name}' is of Python itself"):
        load_recipe(recipe)
    assert "antigravity" not in sys.modules


def _altered(text: str, seed: int) -> str:
    """A recipe with a character changed, a line moved or lost, or a value of another type."""
    dice = random.Random(seed)
    lines = text.splitlines()
    at = dice.randrange(len(lines))
    match seed % 4:
        case 0:
            place = dice.randrange(len(text))
            return text[:place] + dice.choice("{}[]:#&*!|>%@`'\\x\t0-") + text[place + 1 :]
        case 1:
            lines.insert(dice.randrange(len(lines)), lines.pop(at))
        case 2:
            del lines[at]
        case _:
            wrong = dice.choice(
                ("[]", "{}", "-1", ".nan", "x", "[1, {a: b}]", "null", "1e400", "!!x y")
            )
            lines[at] = f"{lines[at].partition(':')[0]}: {wrong}"
    return "\n".join(lines)


def _fuzz(folder: Path, seeds: range, capsys: pytest.CaptureFixture[str]) -> dict[int, str]:
    """What is wrong about the answers of `plan` to altered recipes, by seed."""
    source = (SHIPPED / "qat/digits_w4a4_lsq.yaml").read_text()
    text = yaml.safe_dump(load_recipe("qat/digits_w4a4_lsq")) if "base:" in source else source
    found = {}
    for seed in seeds:
        recipe = _write(folder / f"altered{seed}.yaml", _altered(text, seed))
        status = main(["plan", "--config", str(recipe)])
        said = capsys.readouterr().err.strip()
        if status not in (0, 1, 2) or (status and len(said.splitlines()) != 1):
            found[seed] = f"status {status}: {said}"
    return found


def test_altered_recipes_plan_or_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not _fuzz(tmp_path, range(4), capsys)


@pytest.mark.slow
def test_fifty_altered_recipes_plan_or_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not _fuzz(tmp_path, range(4, 54), capsys)
