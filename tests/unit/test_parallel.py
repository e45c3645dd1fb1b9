"""Where a process takes its place among the ranks from."""

from __future__ import annotations

import pytest

from mvptr_ds.parallel import first_host, take_place_from_slurm

JOB = {
    "SLURM_JOB_ID": "41",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}  # of a batch script
TASK = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


def test_a_task_of_a_step_is_a_rank() -> None:
    environment = {**JOB, **TASK}
    take_place_from_slurm(environment)
    given = {key: environment[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert given == dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_ADDR="gpu07", MASTER_PORT="20287")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        JOB,  # a plain python in a batch script or below salloc
        {**JOB, **TASK, "SLURM_STEP_NUM_TASKS": "1"},  # in the shell of `srun --pty bash`
        {**JOB, **TASK, "RANK": "0", "WORLD_SIZE": "2"},  # below a launcher that is a task itself
    ],
)
def test_nothing_else_is(environment: dict[str, str]) -> None:
    before = dict(environment)
    take_place_from_slurm(environment)
    assert environment == before


def test_a_site_may_choose_address_and_port() -> None:
    environment = {**JOB, **TASK, "MASTER_ADDR": "gpu07-ib", "MASTER_PORT": "1234"}
    take_place_from_slurm(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu07-ib", "1234")


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"),
        ("node1,node7", "node1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[12,07]", "gpu12"),
        ("rack[0-1]-n[3,5]-ib,x", "rack0-n3-ib"),
    ],
)
def test_the_first_host_of_a_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first
