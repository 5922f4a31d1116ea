"""Experiment trackers: what a recipe names as `trainer.logger`, told of the run of any command.

A tracker gets the recipe, and at the end the numbers of `metrics.json` under their own names, with
its tables and the pictures of the run. `fit` adds the curves of training, `adapt` a point a batch
of the stream. W&B keeps the model as an artifact where its setting `log_model` says so.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any

import yaml
from pytorch_lightning.loggers import Logger, WandbLogger

from qat.cli.console import console
from qat.cli.exhibits import exhibit
from qat.cli.run_folder import RunFolder, is_first_process
from qat.cli.session import Session
from qat.extras import imported

EXTRAS = {"MLFlowLogger": "mlflow", "TensorBoardLogger": "tensorboard"}
"""Trackers that an extra brings, which is called like its module."""


@contextmanager
def trackers(session: Session) -> Iterator[list[Logger]]:
    """The trackers of a recipe, told the recipe; they write into the run folder.

    A W&B run ends with the block, so that the next one of this process is another. Where the block
    raises, it is left to the end of the process, which marks it as failed.

    A tracker that fails within the block is left out from there on, with a word to the user: the
    run and its files do not depend on it.
    """
    session = _placed(session)
    setting = session.changed({"trainer.callbacks": None}).section("trainer")["logger"]
    several = setting if isinstance(setting, list | tuple) else [setting]
    loggers = [logger for logger in several if isinstance(logger, Logger)]
    for logger in loggers:
        told = session.parser.dump(session.config, skip_validation=True)
        logger.log_hyperparams(yaml.safe_load(told))
    yield loggers
    _tell(loggers, _end)


def finish(
    folder: RunFolder,
    loggers: list[Logger],
    items: dict[str, Any],
    draw: Callable[[], None] = lambda: None,
) -> None:
    """Write `metrics.json`, draw, and tell the trackers what the run leaves.

    JSON knows no number that is not finite: `null` stands for it, and its key in `not_finite`.
    Pictures come after the numbers, which a picture that fails does not cost.

    Raises:
        ValueError: If there was one, after all is written.
    """
    kept, broken = finite(items)
    folder.write_metrics(kept | ({"not_finite": broken} if broken else {}))
    log_numbers(loggers, items)
    draw()
    _tell(loggers, lambda logger: exhibit(logger, folder.path, kept))
    if broken:
        raise ValueError(
            f"{', '.join(broken[:3])} is not finite, so the result means little; all that was "
            f"measured is in '{folder.metrics}'"
        )


def finite(value: Any, path: str = "") -> tuple[Any, list[str]]:
    """A value with None for the numbers in it that are not finite, and where these stand."""
    if isinstance(value, float) and not isfinite(value):
        return None, [path]
    if isinstance(value, dict):
        found = {key: finite(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
        return {key: kept for key, (kept, _) in found.items()}, _joined(found.values())
    if isinstance(value, list | tuple):
        parts = [finite(item, f"{path}.{i}") for i, item in enumerate(value)]
        return [kept for kept, _ in parts], _joined(parts)
    return value, []


def _joined(parts: Iterable[tuple[Any, list[str]]]) -> list[str]:
    return [path for _, paths in parts for path in paths]


def log_numbers(loggers: list[Logger], items: dict[str, Any], step: int | None = None) -> None:
    """Tell trackers those of some items that are numbers."""
    numbers = {key: float(x) for key, x in items.items() if type(x) in (int, float)}
    _tell(loggers, lambda logger: logger.log_metrics(numbers, step))


def _tell(loggers: list[Logger], call: Callable[[Logger], None]) -> None:
    """Call every tracker, and drop those that fail."""
    for logger in list(loggers):
        try:
            call(logger)
        except Exception as error:  # trackers are of others, and many use a network
            loggers.remove(logger)
            name = type(logger).__name__
            console.print(f"{name} failed and is left out from here on: {error}", highlight=False)


def _end(logger: Logger) -> None:
    logger.finalize("success")
    if isinstance(logger, WandbLogger) and is_first_process():
        logger.experiment.finish()


def _placed(session: Session) -> Session:
    """Let loggers write into the run folder; W&B keeps one identity when a run is resumed."""
    config, folder = session.config.clone(), session.folder
    loggers = config.trainer.logger
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        arguments = getattr(logger, "init_args", None)
        if arguments is None:
            continue
        if arguments.get("save_dir") in (None, "."):
            arguments["save_dir"] = str(folder.path)
        require_package(logger.class_path.rpartition(".")[2])
        if logger.class_path.endswith("WandbLogger"):
            arguments["id"] = arguments.get("id") or folder.tracker_id()
            arguments["name"] = arguments.get("name") or folder.path.name
            logger["dict_kwargs"] = {"resume": "allow", **(logger.get("dict_kwargs") or {})}
    return session.changed({"trainer": config.trainer})


def require_package(logger: str) -> None:
    """Refuse a tracker whose extra is missing.

    Args:
        logger: Name of its class.

    Raises:
        ValueError: If its module is not installed.
    """
    if (extra := EXTRAS.get(logger)) is not None:
        imported(extra, extra, f"log with {logger}")
