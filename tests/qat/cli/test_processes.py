"""Who started this process: variables of torchrun, SLURM and Lightning, whole and left over."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytorch_lightning.utilities import rank_zero_only

from qat.cli.processes import ONE, Processes, left_aside, num_processes, placed, processes_in
from tests import runs

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
LIGHTNING = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}
VARIABLES = ("RANK", "NODE_RANK", "SLURM_JOB_NAME", *TORCHRUN, *LIGHTNING, *SLURM)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets variables of processes, beside no others, and restores what they lead to."""

    def put(variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what a run sets is undone
        monkeypatch.delenv(name)
    yield put
    rank_zero_only.rank = 0  # type: ignore[attr-defined]


def _trainer(devices: Any = "auto", nodes: int = 1, strategy: str = "auto") -> SimpleNamespace:
    return SimpleNamespace(devices=devices, num_nodes=nodes, strategy=strategy)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ONE),
        (TORCHRUN, Processes(False, 4, 2, "torchrun", "WORLD_SIZE")),
        (LIGHTNING, Processes(False, 2, 1, "Lightning", "WORLD_SIZE")),
        (LIGHTNING | {"LOCAL_RANK": "0"}, Processes(True, 2, 1, "Lightning", "WORLD_SIZE")),
        (SLURM, Processes(False, 2, 1, "SLURM", "SLURM_NTASKS")),
        (SLURM | {"SLURM_PROCID": "0"}, Processes(True, 2, 1, "SLURM", "SLURM_NTASKS")),
        (SLURM | TORCHRUN, Processes(False, 4, 2, "torchrun", "WORLD_SIZE")),
    ],
)
def test_process_knows_who_started_it(variables: dict[str, str], expected: Processes) -> None:
    assert processes_in(variables) == expected


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "1"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "1"},
        {"SLURM_NTASKS": "2"},
        SLURM | {"SLURM_JOB_NAME": "interactive"},
        {"LOCAL_RANK": "1"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"JSM_NAMESPACE_RANK": "1"},
    ],
    ids=str,
)
def test_variables_that_are_left_over_mean_nothing(variables: dict[str, str]) -> None:
    found = processes_in(variables)
    assert found.first and found.count == 1
    assert placed(_trainer(), found) == placed(_trainer(1), found) == {}


def test_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match="SLURM_NTASKS must be a number, got '2x'"):
        processes_in({"SLURM_NTASKS": "2x"})


@pytest.mark.parametrize(
    ("devices", "count"),
    [("auto", None), (-1, None), (2, 2), ("2", 2), ("0,1", 2), ("3,", 1), ([0, 2], 2)],
)
def test_devices_of_a_recipe_are_counted_as_lightning_does(devices: Any, count: Any) -> None:
    assert num_processes(_trainer(devices)) == count
    assert num_processes(_trainer(devices, nodes=3)) == (count and 3 * count)


def test_torchrun_decides_where_the_recipe_leaves_it_open() -> None:
    assert placed(_trainer(), processes_in(TORCHRUN)) == {"devices": 2, "num_nodes": 2}
    assert placed(_trainer(2, nodes=2), processes_in(TORCHRUN)) == {}


@pytest.mark.parametrize(
    ("variables", "trainer", "name"),
    [
        (TORCHRUN, _trainer(3), "WORLD_SIZE"),
        (TORCHRUN, _trainer(1), "WORLD_SIZE"),
        (LIGHTNING, _trainer(3), "WORLD_SIZE"),
        (SLURM, _trainer(3), "SLURM_NTASKS"),
        (SLURM, _trainer(1), "SLURM_NTASKS"),
        (SLURM, _trainer(), "SLURM_NTASKS"),
    ],
)
def test_numbers_that_disagree_are_refused_with_the_variable(
    variables: dict[str, str], trainer: SimpleNamespace, name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        placed(trainer, processes_in(variables))


def test_processes_that_nobody_would_start_are_refused() -> None:
    with pytest.raises(ValueError, match=r"LOCAL_RANK is set without WORLD_SIZE, MASTER_ADDR"):
        placed(_trainer(2), processes_in({"LOCAL_RANK": "1"}))


def test_machines_that_nobody_started_are_not_waited_for() -> None:
    with pytest.raises(
        ValueError, match=r"trainer\.num_nodes is 2, but nothing says which machine"
    ):
        placed(_trainer(1, nodes=2), ONE)


@pytest.mark.parametrize(
    ("devices", "one"), [("auto", 1), (4, 1), ([2, 3], [2]), ("2,3", [2]), (-1, 1)]
)
def test_command_in_one_process_takes_one_device_and_says_what_it_leaves(
    devices: Any, one: Any
) -> None:
    alone = Processes(alone=True)
    settings = placed(_trainer(devices, nodes=2, strategy="ddp"), alone)
    assert settings == {"devices": one, "num_nodes": 1, "strategy": "auto"}
    assert "trainer.strategy ddp" in left_aside(_trainer(devices, strategy="ddp"), alone)
    assert left_aside(_trainer(), alone) == ""


@pytest.mark.parametrize(
    "variables",
    [{"SLURM_PROCID": "1"}, {"SLURM_NTASKS": "2"}, {"LOCAL_RANK": "1", "RANK": "1"}],
    ids=str,
)
def test_left_over_rank_does_not_silence_a_run(
    variables: dict[str, str], environment: Any, tmp_path: Path
) -> None:
    environment(variables)
    found = runs.fit("configs/digits_teacher.yaml", tmp_path / "run", "--trainer.max_steps", 1)
    assert found["n_images"] == 360
    assert (tmp_path / "run" / "config.yaml").exists()


def test_run_that_is_one_of_several_tasks_names_the_variable(
    environment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment(SLURM)
    for command in ("fit", "test"):
        words = ("--config", "configs/digits_teacher.yaml", "--run_dir", tmp_path / "run")
        assert runs.run(command, *words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "SLURM_NTASKS is 2" in line and "--trainer.devices 2" in line
    assert not (tmp_path / "run").exists()
