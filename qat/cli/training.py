"""A training run in a run folder, and the runs that must come before one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from qat import checkpoint as files
from qat import disk
from qat.cli.console import check_coverage, console
from qat.cli.evaluation import evaluate, model_items
from qat.cli.main import make_parser
from qat.cli.preflight import Schedule, require_monitors, require_training
from qat.cli.progress import RunJournal
from qat.cli.run_folder import RunFolder, is_first_process
from qat.cli.session import Session
from qat.cli.trackers import finish, trackers
from qat.lightning.callbacks import OrderlyInterrupt, OscillationTracker
from qat.lightning.data import VisionData
from qat.lightning.doctor import Doctor
from qat.lightning.records import Records
from qat.lightning.training import Training
from qat.quantizers import quantizers
from qat.train.doctor import Diagnosis

LENGTH = frozenset(
    f"trainer.{name}" for name in ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")
)
"""What a run that is continued may have otherwise: how long it trains."""


@dataclass(frozen=True)
class Watching:
    """How a training is watched by the doctor.

    Args:
        enabled: Look for faults.
        strict: End the run at the first fault.
    """

    enabled: bool = True
    strict: bool = False


def train(session: Session) -> None:
    """Train, evaluate, and write `metrics.json`; what has to be trained first comes first."""
    session = short(session)
    resume = _checkpoint_to_resume(session)
    evaluator, data = _checked(session)
    asked, session = session, with_judge(with_teacher(session))
    session.prepare()
    session = session.with_classes(data)
    module = session.module()
    data.follow(module.model)
    check_coverage(module.model, session.config.require_coverage)
    schedule = Schedule.of(evaluator, data)
    logged = (*module.measures, *OscillationTracker.measures)
    require_monitors(session.callbacks(), logged, schedule)
    if is_first_process():
        asked.keep_recipe()
    tracker, interrupt = OscillationTracker(), OrderlyInterrupt()
    watching, tell = Watching(**session.section("doctor")), partial(_tell, session.folder)
    doctor = Doctor(watching.strict, tell) if watching.enabled else None
    callbacks = [interrupt, *_checkpoints(session, schedule)]
    if any(True for _ in quantizers(module.model)):
        callbacks += [tracker, Records(session.folder.path, tracker)]
    callbacks += [doctor] if doctor else []
    with trackers(session) as loggers:
        csv_logger = session.folder.logger(None if resume is None else _step(resume))
        trainer = session.trainer([csv_logger, *loggers], callbacks)
        try:
            with RunJournal(session.folder.path, console, waits=True) as module.journal:
                trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
            module.journal.clear()
            interrupted = interrupt.asked
        except SystemExit:  # how Lightning ends after Ctrl-C, its checkpoint written
            interrupted = True
        if interrupted:
            folder = session.folder.path
            console.print(f"interrupted; continue with --run_dir {folder} --ckpt_path last")
            raise KeyboardInterrupt
        _keep_trained(trainer, module, session.folder.last)
        with _kept(session.folder.last):
            items = {
                **session.items(trainer.strategy.root_device),
                **_measured(session, module, data, evaluator),
                "epochs": trainer.current_epoch,
                "n_refused_train": len(data.refused["train"].faults),
                **tracker.summary(),
                **({"doctor": doctor.found} if doctor else {}),
            }
        finish(session.folder, loggers, items)


def _tell(folder: RunFolder, diagnosis: Diagnosis) -> None:
    """Print a diagnosis, and keep it in the run folder whatever becomes of the run."""
    console.print(f"doctor: {diagnosis}", highlight=False, markup=False)
    if is_first_process():
        path = folder.path / "doctor.txt"
        size = path.stat().st_size if path.exists() else 0
        disk.append(path, size, f"{diagnosis}\n".encode())


def _checked(session: Session) -> tuple[Trainer, VisionData]:
    """A trainer that evaluates, and the data; what a recipe has wrong shows before its teacher."""
    require_training(session.config.trainer)
    evaluator = session.evaluator()
    session.prepare()
    parts = ("initialise", "objective", "optimizer", "quantizer", "regularizer")
    session.initialised().objects(*(f"model.{part}" for part in parts))
    data = session.data()
    data.require_labels()
    return evaluator, data


@contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Where the evaluation fails, say that training is done and where its result is."""
    try:
        yield
    except Exception:
        console.print(f"training is done and kept in '{path}', only its evaluation failed")
        raise


def with_teacher(session: Session) -> Session:
    """The session with a checkpoint of the teacher, trained where the recipe says how.

    It is trained in the folder `teacher` of the run folder, unless that is done, or a run beside
    this one has trained it already.
    """
    config = session.config
    if not config.teacher_config or config.model.teacher is not None:
        return session
    return session.changed(
        {"model.teacher": _train_first(session, "teacher", config.teacher_config)}
    )


def with_judge(session: Session) -> Session:
    """The session with a checkpoint of the task's judge, trained like a teacher, in `judge`.

    Raises:
        ValueError: If the recipe trains a judge for a task that knows none.
    """
    config = session.config
    arguments = config.task.get("init_args") or Namespace()
    if config.judge_config is None or arguments.get("judge") is not None:
        return session
    if "judge" not in arguments:
        raise ValueError("judge_config has no effect: the task knows no judge; remove it")
    path = _train_first(session, "judge", config.judge_config)
    return session.changed({"task.init_args.judge": path})


def _train_first(session: Session, name: str, recipe: str) -> str:
    """A model's checkpoint; trains it in `<run folder>/<name>` unless that is done."""
    first = RunFolder(session.folder.path / name)
    words = ["--config", recipe, "--run_dir", str(first.path)]
    words += ["--seed_everything", str(session.seed)]
    if first.last.exists():
        words += ["--ckpt_path", "last"]
    parser = make_parser("fit")
    config = parser.parse_args([*words, *session.flags])
    training = replace(session.inside(first), command="fit", parser=parser, config=config)
    if (trained := _trained_beside(training, name)) is not None:
        console.print(f"{name}: that of '{trained.path}', trained by the same recipe")
        return str(trained.last)
    if not first.metrics.exists():
        console.rule(f"{name}: {recipe}")
        if session.flags:
            console.print(f"the flags {' '.join(session.flags)} hold for the {name} too")
        train(training)
        console.rule(f"{name} done")
    return str(first.last)


def _trained_beside(training: Session, name: str) -> RunFolder | None:
    """The folder of the same training, finished, in a run folder beside this one."""
    for path in sorted(training.folder.path.parents[1].glob(f"*/{name}/metrics.json")):
        folder = RunFolder(path.parent)
        same = folder.recipe.exists() and folder.recipe.read_text() == training.recipe
        if same and folder.read_metrics()["torch_version"] == str(torch.__version__):
            return folder
    return None


def _measured(
    session: Session, module: Training, data: VisionData, evaluator: Trainer
) -> dict[str, Any]:
    """Measures and costs of the trained model, and those of its teacher as `<key>_teacher`."""
    items = evaluate(session, module.model, data, evaluator)
    if module.teacher is not None:
        teacher = evaluate(session, module.teacher, data, evaluator)
        kept = {"top1", "n_images", *model_items(module.teacher)} - {
            "class_names",
            "coverage",
            "products",
        }
        items |= {f"{key}_teacher": teacher[key] for key in kept}
    return items


def short(session: Session) -> Session:
    """The session with what `trainer.fast_dev_run` is short for.

    Lightning's own would keep no checkpoint, which a student needs of its teacher.
    """
    if not (batches := int(session.config.trainer.fast_dev_run)):
        return session
    limits = {"limit_train_batches": batches, "limit_val_batches": batches, "max_epochs": 1}
    settings = {"fast_dev_run": False, "max_steps": -1, "num_sanity_val_steps": 0, **limits}
    return session.changed({f"trainer.{key}": value for key, value in settings.items()})


def _keep_trained(trainer: Trainer, module: Training, last: Path) -> None:
    """Save the model that training ends with, if the last checkpoint holds another one.

    Callbacks that average weights put them into the model when the last epoch is over.
    """
    trained = files.digest(module.model.state_dict())
    kept = files.read(last)[files.MANIFEST]["tensors"] if last.exists() else None
    if trainer.strategy.broadcast(kept != trained):  # one answer for all processes
        trainer.save_checkpoint(last)


def _checkpoints(session: Session, schedule: Schedule) -> list[ModelCheckpoint]:
    """The last state, written each epoch and on any exception, and the best one validated."""
    monitor, mode = session.task().monitor
    options: dict[str, Any] = {
        "dirpath": session.folder.checkpoints,
        "enable_version_counter": False,
    }
    last = ModelCheckpoint(filename="last", save_on_exception=True, **options)
    if schedule.validates:
        return [last, ModelCheckpoint(filename="best", monitor=monitor, mode=mode, **options)]
    console.print(
        f"no best.ckpt, only last.ckpt: training ends after {schedule.total:g} batches, before the "
        f"first validation after {schedule.first_validation:g}"
    )
    return [last]


def _checkpoint_to_resume(session: Session) -> Path | None:
    """The checkpoint to resume from; None also where only a teacher has been trained so far."""
    folder, path = session.folder, session.config.ckpt_path
    begun = (folder.path / "teacher").is_dir() and not folder.last.exists()
    if path == "last" and begun and not folder.metrics.exists():
        return None
    resume = folder.checkpoint_to_resume(path)
    if resume is not None and folder.recipe.exists():
        session.require_same_recipe(free=LENGTH)
    return resume


def _step(path: Path) -> int:
    return int(torch.load(path, map_location="cpu", weights_only=True)["global_step"])
