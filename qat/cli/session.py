"""A session: one command at work, from its configuration to the objects that the recipe names."""

import platform
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning_fabric.plugins import CheckpointIO
from lightning_fabric.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.loggers import Logger
from torch import nn

from qat import disk
from qat.cli.console import console
from qat.cli.preflight import require_evaluation
from qat.cli.processes import ONE, Processes, adopt_slurm, left_aside, placed, shared
from qat.cli.recipe import differences
from qat.cli.run_folder import RunFolder
from qat.lightning.checkpoint_io import WholeFiles
from qat.lightning.data import VisionData
from qat.lightning.tasks import Remembered, Task
from qat.lightning.training import Training, converted, plan_for
from qat.plan import Plan


@dataclass(frozen=True)
class Session:
    """One command at work: its parser, its configuration, its run folder.

    The configuration is never changed; `changed` gives another session.

    Attributes:
        command: Name of the command.
        parser: Its parser.
        config: Its configuration.
        folder: Its run folder.
        flags: What the command line says of the trainer; it holds for the teacher's as well.
        here: The processes that were started for it.
        remembered: Results that the sessions of a grid share.
        started: When it began, on the clock of `time.monotonic`.
    """

    command: str
    parser: LightningArgumentParser
    config: Namespace
    folder: RunFolder
    flags: tuple[str, ...] = ()
    here: Processes = ONE
    remembered: Remembered = field(default_factory=Remembered)
    started: float = field(default_factory=time.monotonic)

    @staticmethod
    def begin(
        command: str,
        parser: LightningArgumentParser,
        config: Namespace,
        flags: tuple[str, ...] = (),
        here: Processes = ONE,
    ) -> "Session":
        """The session of a command, in the run folder that the user asked for."""
        if "trainer" in config:  # not every command has one
            placed(config.trainer, here)  # refused before there is a folder
            if idle := left_aside(config.trainer, here) if here.alone else "":
                console.print(f"{command} runs in one process and leaves aside {idle}")
        adopt_slurm(here)
        folder = _folder(config.get("run_dir"), _recipe_name(config), here)
        return Session(command, parser, config, folder, flags, here)

    def changed(self, settings: Mapping[str, Any]) -> "Session":
        """The same session with some settings changed, by dotted key."""
        config = self.config.clone()
        for key, value in settings.items():
            config[key] = value
        return replace(self, config=config)

    def overlaid(self, recipe: Mapping[str, Any]) -> "Session":
        """The same session with a recipe laid over its configuration."""
        return replace(self, config=self.parser.parse_object(dict(recipe), self.config.clone()))

    def inside(self, folder: RunFolder) -> "Session":
        """The same session in another run folder, begun now."""
        return replace(self, folder=folder, started=time.monotonic())

    @property
    def seed(self) -> int:
        """Seed of everything."""
        return self.config.seed_everything

    def prepare(self) -> None:
        """Set threads and seeds; to be called before anything is built."""
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)
        seed_everything(self.seed, verbose=False)

    def section(self, name: str) -> dict[str, Any]:
        """The arguments in a section of the recipe, their objects built."""
        objects = self.parser.instantiate(Namespace({name: self.config[name]}))
        return dict(objects[name].items(branches=True, nested=False))

    def objects(self, *keys: str) -> Namespace:
        """What some keys of the recipe name, built."""
        return self.parser.instantiate(Namespace({key: self.config[key] for key in keys}))

    def task(self) -> Task:
        """What the model is for."""
        return self.objects("task").task

    def with_classes(self, data: VisionData) -> "Session":
        """The session whose timm model has the classes of the data, where nobody said a number."""
        model = self.config.model.model
        arguments = getattr(model, "init_args", None) or {}
        if "num_classes" not in arguments or arguments["num_classes"] is not None:
            return self
        classes = (data.train or data.val).num_classes
        return self.changed({"model.model.init_args.num_classes": classes})

    def module(self) -> Training:
        """The Lightning module; builds the model and loads the teacher."""
        return self.task().module(**self.initialised().section("model"))

    def model(self) -> nn.Module:
        """The model alone, converted by the plan, without teacher and objective."""
        made = self.section("model")
        keys = ("model", "plan", "quantizer", "convert")
        return converted(**{key: made[key] for key in keys}, checkpoint=made["teacher"])

    def plan(self) -> Plan:
        """The bit-width plan of the model."""
        quantizer = self.objects("model.quantizer").model.quantizer
        return plan_for(quantizer, self.config.model.plan)

    def data(self) -> VisionData:
        """The data module; reads the data."""
        return VisionData(**self.section("data"), seed=self.seed)

    def callbacks(self) -> list[Callback]:
        """The recipe's own callbacks."""
        return _as_list(self.objects("trainer.callbacks").trainer.callbacks)

    def trainer(
        self, loggers: Iterable[Logger] = (), callbacks: Iterable[Callback] = ()
    ) -> Trainer:
        """The trainer, with the recipe's callbacks before further ones."""
        made = self.changed({"trainer.logger": False}).section("trainer")
        made["callbacks"] = [*self.callbacks(), *callbacks]
        return Trainer(**{**made, **self._place(made), "logger": list(loggers)})

    def evaluator(self) -> Trainer:
        """A trainer that only evaluates, without callbacks.

        Raises:
            ValueError: If under the recipe's settings it could not.
        """
        require_evaluation(self.config.trainer)
        quiet = self.changed({"trainer.logger": False, "trainer.callbacks": None})
        made = quiet.section("trainer")
        return Trainer(**{**made, **self._place(made), "enable_checkpointing": False})

    def initialised(self) -> "Session":
        """The session with what `--init` is short for.

        Raises:
            ArgumentError: If there is no such initialiser.
        """
        if self.config.init is None:
            return self
        return self.overlaid({"model": {"initialise": {"class_path": self.config.init}}})

    @property
    def recipe(self) -> str:
        """The recipe as YAML, without what says where and from which checkpoint it runs."""
        settings = self.config.clone()
        settings.ckpt_path = settings.config = settings.run_dir = None
        return self.parser.dump(settings, skip_validation=True)

    def keep_recipe(self) -> None:
        """Keep the recipe in the run folder.

        To be called once all is checked, so that a refused run leaves no folder behind.
        """
        self.folder.path.mkdir(parents=True, exist_ok=True)
        disk.write(self.folder.recipe, self.recipe)

    def require_new(self) -> None:
        """Refuse a folder that holds a run.

        Raises:
            ValueError: If it does.
        """
        if self.folder.metrics.exists():
            raise ValueError(f"run folder '{self.folder.path}' already holds a run; choose another")

    def resumes(self) -> bool:
        """Whether this run continues one in the folder.

        Raises:
            ValueError: If the folder holds a run that is complete, that nobody asked to continue,
                or that had another recipe.
        """
        folder, resume = self.folder, self.config.ckpt_path == "last"
        if folder.metrics.exists() or (folder.recipe.exists() and not resume):
            raise ValueError(
                f"run folder '{folder.path}' already holds a run; continue an incomplete one with "
                "--ckpt_path last, or choose another --run_dir"
            )
        if not resume:
            return False
        if not folder.recipe.exists():
            raise ValueError(f"no run to continue in '{folder.path}'; leave --ckpt_path out")
        self.require_same_recipe()
        return True

    def require_same_recipe(self, free: Collection[str] = ()) -> None:
        """Refuse to continue a run that had another recipe.

        Args:
            free: Keys in which it may differ.

        Raises:
            ValueError: Naming the first key that differs and both values.
        """
        theirs, ours = self.folder.read_recipe(), yaml.safe_load(self.recipe)
        for key, kept, asked in differences(theirs, ours):
            if key not in free:
                raise ValueError(
                    f"the run in '{self.folder.path}' had another recipe: {key} is {kept!r:.60} "
                    f"there and {asked!r:.60} here; continue it with the one kept in its "
                    "config.yaml, or choose another --run_dir"
                )

    def items(self, device: Any) -> dict[str, Any]:
        """What every `metrics.json` says of its run."""
        return {
            "command": self.command,
            "recipe": _recipe_name(self.config),
            "seed": self.seed,
            "seconds": round(time.monotonic() - self.started, 3),
            "device": str(device),
            "processor": platform.processor() or platform.machine(),
            "torch_version": str(torch.__version__),
        }

    def _place(self, made: dict[str, Any]) -> dict[str, Any]:
        """Where a trainer works: in which folder, on which devices, as which process."""
        return {
            "default_root_dir": str(self.folder.path),
            "plugins": [*_with_checkpoint_io(_as_list(made["plugins"])), LightningEnvironment()],
            **placed(self.config.trainer, self.here),
        }


def _folder(run_dir: str | None, recipe: str, here: Processes) -> RunFolder:
    """The run folder; of several processes the first one names it."""
    if run_dir is not None or here.count == 1 or here.starter == "Lightning":
        return RunFolder.named(run_dir, recipe)
    if not here.first:
        return RunFolder(shared(None, here))
    folder = RunFolder.named(None, recipe)
    shared(str(folder.path), here)
    return folder


def in_run_folder(run: Callable[[Session], None]) -> Callable[[Session], None]:
    """A command that has its run folder for itself as long as it runs."""

    @wraps(run)
    def claiming(session: Session) -> None:
        with session.folder.claimed() as folder:
            run(replace(session, folder=folder))

    return claiming


def _with_checkpoint_io(plugins: list[Any]) -> list[Any]:
    """Plugins of a trainer, ours for checkpoints among them unless there is another."""
    has_one = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
    return plugins if has_one else [*plugins, WholeFiles()]


def _recipe_name(config: Namespace) -> str:
    """Name of the first recipe file, without folder and ending."""
    paths = config.get("config") or []
    return Path(str(paths[0])).stem if paths else "flags"


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []
