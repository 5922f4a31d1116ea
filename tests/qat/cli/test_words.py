"""Options mean the same with `=` and with a space; one that is given twice is refused."""

import pytest

from qat.cli.words import of_trainer, options, require_once, with_save_dir

LOGGER = "--trainer.logger"


@pytest.mark.parametrize(
    "words",
    [["--a.b", "3", "--c=x=y", "--d"], ["--a.b=3", "--c", "x=y", "--d"]],
    ids=["mixed", "other way round"],
)
def test_options_are_read_with_and_without_an_equals_sign(words: list[str]) -> None:
    assert options(words) == [("--a.b", "3"), ("--c", "x=y"), ("--d", "")]


def test_negative_number_is_a_value() -> None:
    assert options(["--a", "-1"]) == [("--a", "-1")]


@pytest.mark.parametrize(
    "words",
    [
        ["--model.plan", "w4a4", "--model.plan", "w8a8"],
        ["--model.plan=w4a4", "--model.plan", "w8a8"],
        ["--x", "1", "--model.plan", "w4a4", "--y=2", "--model.plan=w8a8"],
    ],
)
def test_option_with_two_values_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--model\.plan is given twice, as 'w4a4' and as 'w8a8'"):
        require_once(words)


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "a.yaml", "--config=b.yaml"],
        ["--seed", "1", "--seed=1"],
        ["--t.callbacks+=A", "--t.callbacks.x=1", "--t.callbacks+=B", "--t.callbacks.x=2"],
    ],
    ids=["recipes", "the same value", "elements of a list"],
)
def test_what_may_come_several_times_is_left_alone(words: list[str]) -> None:
    require_once(words)


def test_key_that_stands_twice_in_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--model\.plan: key 'bits' stands on line 1 and again"):
        require_once(["--model.plan=[{pattern: head, weight: {bits: 4, bits: 8}}]"])
    require_once(["--x", "[{a: 1}, {a: 1}]", "--y={a: [", "--z", "{a"])


@pytest.mark.parametrize("name", ["TensorBoardLogger", "pytorch_lightning.loggers.CSVLogger"])
@pytest.mark.parametrize("form", ["=", " "])
def test_logger_that_needs_a_folder_gets_it_in_either_form(name: str, form: str) -> None:
    words = f"{LOGGER}{form}{name}".split()
    assert with_save_dir(words) == [*words, "--trainer.logger.save_dir", "."]


@pytest.mark.parametrize(
    "words",
    [
        [f"{LOGGER}=WandbLogger"],
        [f"{LOGGER}=NoSuchLogger"],
        [f"{LOGGER}=CSVLogger", "--trainer.logger.save_dir=x"],
        ["--trainer.max_epochs", "3"],
    ],
)
def test_other_words_stay_as_they_are(words: list[str]) -> None:
    assert with_save_dir(words) == words


def test_settings_of_the_trainer_are_told_apart_from_others() -> None:
    words = ["--seed", "1", "--trainer.max_epochs", "2", "--model.plan=x", "--trainer.a+=B"]
    assert of_trainer(words) == ("--trainer.max_epochs=2", "--trainer.a+=B")
