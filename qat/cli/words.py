"""Words of a command line as options with values, before the parser sees them."""

from collections.abc import Sequence
from inspect import Parameter, signature

from yaml import YAMLError

from qat.documents import require_unique_keys

TRAINER = "--trainer."


def options(words: Sequence[str]) -> list[tuple[str, str]]:
    """Options and their values, written with `=` or with a space."""
    found = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        key, equals, value = word.partition("=")
        if key.startswith("--"):
            found.append((key, value if equals or following.startswith("--") else following))
    return found


def require_once(words: Sequence[str]) -> None:
    """Refuse an option, or a key in its value, that is given twice; the last one would win.

    Recipes and what is added to a list may come several times.

    Raises:
        ValueError: If there is one.
    """
    seen: dict[str, str] = {}
    lists = tuple(key.rstrip("+") for key, _ in options(words) if key.endswith("+"))
    for key, value in options(words):
        if key == "--config" or (lists and key.startswith(lists)):
            continue
        _require_unique_keys(key, value)
        if seen.setdefault(key, value) != value:
            raise ValueError(f"{key} is given twice, as '{seen[key]}' and as '{value}'; drop one")


def _require_unique_keys(key: str, value: str) -> None:
    """Refuse a value with a mapping in which a key stands twice; other faults are the parser's."""
    try:
        require_unique_keys(value if value.startswith(("{", "[")) else "")
    except YAMLError:
        return
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def of_trainer(words: Sequence[str]) -> tuple[str, ...]:
    """Those words that set the trainer, each option and its value in one."""
    return tuple(f"{key}={value}" for key, value in options(words) if key.startswith(TRAINER))


def with_save_dir(words: list[str]) -> list[str]:
    """Spare the user the folder of a logger that insists on one: it is the run folder."""
    given = dict(options(words))
    name = given.get("--trainer.logger", "").rpartition(".")[2]
    if not name or any("save_dir" in word for word in words):
        return words
    import pytorch_lightning.loggers

    logger = getattr(pytorch_lightning.loggers, name, None)
    folder = signature(logger).parameters.get("save_dir") if logger is not None else None
    if folder is None or folder.default is not Parameter.empty:
        return words
    return [*words, "--trainer.logger.save_dir", "."]
