"""Where a process takes its place among the ranks from."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from unittest.mock import Mock

import pytest

from mvptr_ds.distributed.collectives import first_host, take_place_from_slurm
from mvptr_ds.distributed.rendezvous import ANY_PORT, check_place, rendezvous

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


RANK_1 = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, RANK_1, {"MASTER_PORT": "left over"}])
def test_a_place_that_is_well_described(environment: dict[str, str]) -> None:
    check_place(environment)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "2"}, "RANK is '2' in the environment, must be one of the numbers 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "²"}, "RANK is '²'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment, must be a whole number of at least 1"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK is 'gpu0'"),
        ({"MASTER_PORT": "tcp://10.0.0.1:29500"}, "MASTER_PORT is 'tcp://10.0.0.1:29500'"),  # as Kubernetes sets it
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536' in the environment, must be one of the numbers 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0'"),
        ({"MASTER_ADDR": ""}, "RANK is set, but not MASTER_ADDR: start the ranks by deepspeed, torchrun or srun"),
    ],
)
def test_a_place_that_makes_no_sense(changes: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError) as error:
        check_place({**RANK_1, **changes})
    assert said in str(error.value)


def set_place(monkeypatch: pytest.MonkeyPatch, place: Mapping[str, str]) -> None:
    for name, value in place.items():
        monkeypatch.setenv(name, value)


@pytest.mark.timeout(60)
def test_a_rank_alone_is_served_at_a_port_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by binding it: one that was found free before may be taken by then."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ANY_PORT}
    set_place(monkeypatch, alone)
    store = rendezvous(10.0)
    assert store is not None
    socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])), 5.0).close()


@pytest.mark.timeout(60)
def test_rank_0_that_cannot_be_reached_at_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network for documents, which leads nowhere."""
    with socket.create_server(("", 0)) as free:
        port = str(free.getsockname()[1])
    set_place(monkeypatch, {**RANK_1, "RANK": "0", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": port})
    monkeypatch.setattr("mvptr_ds.distributed.rendezvous.OWN_LIMIT_S", 1.0)
    with pytest.raises(ValueError, match=r"does not reach what it serves itself at MASTER_ADDR=192.0.2.1, port"):
        rendezvous(600.0)


@pytest.mark.timeout(60)
def test_name_servers_that_do_not_answer_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    set_place(monkeypatch, RANK_1)
    silent = Mock(side_effect=socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"))
    monkeypatch.setattr(socket, "getaddrinfo", silent)
    monkeypatch.setattr("mvptr_ds.distributed.rendezvous.NAME_LIMIT_S", 3.0)
    with pytest.raises(ConnectionError, match=r"MASTER_ADDR=localhost cannot be resolved on .* no name server answers"):
        rendezvous(600.0)
    assert silent.call_count > 1
