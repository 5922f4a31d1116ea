"""Processes of a run: who started them, which one this is, and where a trainer puts its work.

Variables of torchrun, of srun and of Lightning's own launcher are read here and nowhere else, so
that those left over in a shell do not make one process believe that it is the second of two.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

INTERACTIVE = ("bash", "interactive")
"""Names of SLURM jobs that are shells."""
LIGHTNING = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PORTS, PORT_OF_NO_JOB = 15_000, 12_910
PATIENCE = timedelta(seconds=120)
"""How long a process waits to be told the run folder."""


@dataclass(frozen=True)
class Processes:
    """The processes that were started from outside for one run.

    Attributes:
        first: Whether this is the one that speaks and writes.
        count: How many there are.
        nodes: On how many machines.
        starter: What started them.
        variable: The environment variable that says how many there are.
        alone: Whether the command runs in one process whatever the recipe says.
        left_over: Whether `LOCAL_RANK` is set and nothing that goes with it.
    """

    first: bool = True
    count: int = 1
    nodes: int = 1
    starter: str = ""
    variable: str = ""
    alone: bool = False
    left_over: bool = False

    @property
    def per_node(self) -> int:
        """Processes on each machine."""
        return self.count // self.nodes


ONE = Processes()
"""A process that nobody started to be one of several."""


def processes_in(environment: Mapping[str, str]) -> Processes:
    """The processes that an environment speaks of; one alone where its variables do not add up.

    Raises:
        ValueError: If a variable is no number.
    """

    def number(name: str, default: int = 0) -> int:
        value = environment.get(name, str(default))
        if not value.isdecimal():
            raise ValueError(f"{name} must be a number, got '{value}'; unset it, or correct it")
        return int(value)

    if "TORCHELASTIC_RUN_ID" in environment:
        count = number("WORLD_SIZE", 1)
        nodes = count // max(1, number("LOCAL_WORLD_SIZE", count))
        return Processes(number("RANK") == 0, count, nodes, "torchrun", "WORLD_SIZE")
    if set(LIGHTNING) <= environment.keys():
        first = number("LOCAL_RANK") == number("NODE_RANK") == 0
        return Processes(first, number("WORLD_SIZE", 1), 1, "Lightning", "WORLD_SIZE")
    tasks = number("SLURM_NTASKS", 1)
    shell = environment.get("SLURM_JOB_NAME") in INTERACTIVE
    if tasks > 1 and "SLURM_PROCID" in environment and not shell:
        nodes = number("SLURM_NNODES", 1)
        return Processes(number("SLURM_PROCID") == 0, tasks, nodes, "SLURM", "SLURM_NTASKS")
    return Processes(left_over="LOCAL_RANK" in environment)


def placed(trainer: Any, here: Processes) -> dict[str, Any]:
    """Settings of a trainer that suit the processes there are.

    Args:
        trainer: The `trainer` section of a recipe.
        here: The processes.

    Raises:
        ValueError: If the recipe wants another number of processes than were started.
    """
    wanted = num_processes(trainer)
    if here.starter == "SLURM" and (here.alone or wanted in (None, 1)):
        raise ValueError(
            f"SLURM_NTASKS is {here.count} and SLURM_PROCID says that this is one of them, but "
            "the run takes one process; start it with `srun --ntasks=1`, unset SLURM_NTASKS, or "
            f"let fit use them all with --trainer.devices {here.per_node} --trainer.num_nodes "
            f"{here.nodes} --trainer.strategy ddp"
        )
    if here.alone:
        return {"devices": _one_of(trainer.devices), "num_nodes": 1, "strategy": "auto"}
    if here.count == 1:
        if (wanted or 1) > 1 and here.left_over:
            raise ValueError(
                "LOCAL_RANK is set without WORLD_SIZE, MASTER_ADDR and MASTER_PORT, so no process "
                "would start the others; unset LOCAL_RANK, or start with torchrun"
            )
        if trainer.num_nodes > 1:
            raise ValueError(
                f"trainer.num_nodes is {trainer.num_nodes}, but nothing says which machine this "
                "is, so it would wait for ever; start every machine with torchrun or srun"
            )
        return {}
    if here.starter == "torchrun" and wanted is None:
        return {"devices": here.per_node, "num_nodes": here.nodes}
    if wanted is not None and wanted != here.count:
        raise ValueError(
            f"{here.starter} started {here.count} processes ({here.variable}), the recipe wants "
            f"{wanted} (trainer.devices {trainer.devices} on {trainer.num_nodes} machines); make "
            "the two agree"
        )
    return {}


def left_aside(trainer: Any, here: Processes) -> str:
    """What of a recipe and of an environment has no effect on a run in one process."""
    found = [f"the other {here.count - 1} that {here.starter} started"] * (here.count > 1)
    if (num_processes(trainer) or 1) > 1:
        found.append(f"trainer.devices {trainer.devices} on {trainer.num_nodes} machines")
    if trainer.strategy != "auto":
        found.append(
            f"trainer.strategy {getattr(trainer.strategy, 'class_path', trainer.strategy)}"
        )
    return ", ".join(found)


def num_processes(trainer: Any) -> int | None:
    """Processes that a recipe wants; None where it leaves that open."""
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        return None
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part] if "," in devices else int(devices)
    return trainer.num_nodes * (devices if isinstance(devices, int) else len(devices))


def adopt_slurm(here: Processes) -> None:
    """Say in Lightning's variables what those of SLURM mean."""
    if here.starter != "SLURM":
        return
    from lightning_fabric.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]

    rank, job = int(os.environ["SLURM_PROCID"]), os.environ.get("SLURM_JOB_ID", "")
    port = PORTS + int(job[-4:]) if job.isdecimal() else PORT_OF_NO_JOB
    nodes = os.environ.get("SLURM_NODELIST", "127.0.0.1")
    meant = {
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", rank % here.per_node),
        "NODE_RANK": os.environ.get("SLURM_NODEID", rank // here.per_node),
        "WORLD_SIZE": here.count,
        "MASTER_ADDR": SLURMEnvironment.resolve_root_node_address(nodes),
        "MASTER_PORT": port,
    }
    for name, value in meant.items():
        os.environ.setdefault(name, str(value))


def shared(name: str | None, here: Processes) -> str:
    """What the first process calls something, told to the others by the store of the run.

    Args:
        name: What the first one calls it; None in the others.
        here: The processes.

    Raises:
        ValueError: If what started them keeps no store.
    """
    if here.starter != "torchrun" or "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"{here.starter} started {here.count} processes ({here.variable}) that cannot agree "
            "on a folder; name it with --run_dir"
        )
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=PATIENCE)
    if name is not None:
        store.set("lowbit", name)
    return store.get("lowbit").decode()


def _one_of(devices: Any) -> Any:
    """One of the devices of a recipe: the first of those that it names."""
    if isinstance(devices, str) and "," in devices:
        devices = [int(part) for part in devices.split(",") if part]
    return devices[:1] if isinstance(devices, list) else 1
