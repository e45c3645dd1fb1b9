"""The ranks' first contact, with limits of its own: that all of them start, that they reach each other."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

logger = logging.getLogger(__name__)
WEEK_S = 7 * 86_400.0
NUM_NAMED = 8
LIMIT_KEY = "(train.start_timeout_s)"
NAME_LIMIT_S, OWN_LIMIT_S = 30.0, 20.0
ANY_PORT = "0"  # of MASTER_PORT: one that is free, which a single rank finds when it binds it
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHERS = "start the ranks by deepspeed, torchrun or srun, which set all of " + ", ".join(PLACE)


@contextmanager
def deadline(limit_s: float, what: str) -> Iterator[None]:
    """Ends this process with 1 and a message when what is inside takes longer: a rank that others wait for in vain.

    0 seconds means no limit.
    """

    def end() -> None:
        logger.error(
            "error: %s: no end of %s within %.0f s. Another rank is gone or cannot be reached: see its log; on several "
            "nodes try NCCL_DEBUG=INFO, and name the network in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME",
            _me(), what, limit_s,
        )  # fmt: skip
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    if limit_s > 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_place(environment: Mapping[str, str]) -> None:
    """Looks at what a launcher says of this process's place among the ranks, before anything waits for the others.

    Raises:
        ValueError: something is missing, or makes no sense.
    """
    if "RANK" not in environment:
        num_ranks = environment.get("WORLD_SIZE", "1")
        if num_ranks != "1":
            raise ValueError(
                f"WORLD_SIZE is {num_ranks}, but RANK is not set: {LAUNCHERS}; without WORLD_SIZE this process is the "
                "only rank"
            )
        return
    missing = [name for name in PLACE if not environment.get(name)]
    if missing:
        raise ValueError(f"RANK is set, but not {', '.join(missing)}: {LAUNCHERS}, or set them yourself")
    _number(environment, "RANK", 0, _number(environment, "WORLD_SIZE", 1) - 1)
    _number(environment, "LOCAL_RANK", 0)
    _number(environment, "MASTER_PORT", 1, 65_535)


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdigit()) or int(text) < least or (most is not None and int(text) > most):
        wanted = f"a whole number of at least {least}" if most is None else f"one of the numbers {least} to {most}"
        raise ValueError(f"{name} is {text!r} in the environment, must be {wanted}: {LAUNCHERS}")
    return int(text)


def rendezvous(within_s: float) -> dist.Store | None:
    """Waits until every rank has started: from then on a short limit tells a network that fails from a slow start.

    Ends this process with 1 and a message when that takes longer; rank 0's names those that are missing.

    Args:
        within_s: 0 for no limit.

    Returns:
        What shows it, served by rank 0 as long as it holds it, at MASTER_ADDR and MASTER_PORT.

    Raises:
        ValueError: rank 0's port is taken, or its address leads nowhere.
        ConnectionError: no name server answers.
    """
    rank, num_ranks, started_s = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), time.monotonic()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _resolve(address, port)
    limit = timedelta(seconds=within_s if within_s > 0 else WEEK_S)
    # torchrun serves one itself, to all ranks; like torch's own `env://`, whose store then joins this one at its port
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _serve(address, port, num_ranks, limit) if serves else None
    if store is not None:
        os.environ["MASTER_PORT"] = str(store.port)
    try:
        if store is None:
            store = dist.TCPStore(address, port, num_ranks, False, limit, wait_for_workers=False, multi_tenant=True)
        store.set(_started(rank), "")
        if store.add("mvptr_ds/num_started", 1) == num_ranks:
            store.set("mvptr_ds/all_started", "")
        store.wait(["mvptr_ds/all_started"], limit)
    except dist.DistError as error:
        after_s = time.monotonic() - started_s
        if after_s < limit.total_seconds():
            why = f"rank 0, or what it serves at {address}:{port}, is gone ({_first_line(error)}); see rank 0's log"
        elif store is not None and rank == 0:
            missing = [str(other) for other in range(num_ranks) if not store.check([_started(other)])]
            named = ", ".join(missing[:NUM_NAMED]) + (" ..." if len(missing) > NUM_NAMED else "")
            why = f"{LIMIT_KEY} {len(missing)} of {num_ranks} ranks have not started: {named}; see their logs"
        else:
            why = f"{LIMIT_KEY} it waits in vain at {address}:{port}, rank 0's ({error}); see rank 0's log"
        logger.error("error: %s: after %.0f s %s", _me(), after_s, why)
        raise SystemExit(1) from error
    return store


def _resolve(address: str, port: int) -> None:
    started_s = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(address, port)
            return
        except (socket.gaierror, UnicodeError) as error:
            text = f"MASTER_ADDR={address} cannot be resolved on {socket.gethostname()} ({error})"
            remedy = "give the name or the address of rank 0's host, as this one knows it"
            if not isinstance(error, socket.gaierror) or error.errno != socket.EAI_AGAIN:
                raise ValueError(f"{text}: {remedy}") from error
            if time.monotonic() - started_s > NAME_LIMIT_S:
                raise ConnectionError(f"{text}: no name server answers; {remedy}, or start again later") from error
        time.sleep(2.0)


def _serve(address: str, port: int, num_ranks: int, limit: timedelta) -> dist.TCPStore:
    """Rank 0's store, which is reached at its address."""
    try:
        store = dist.TCPStore("localhost", port, num_ranks, True, limit, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        raise ValueError(
            f"rank 0 cannot serve port {port} of {socket.gethostname()}, which another run may have taken "
            f"({_first_line(error)}): choose another one, by deepspeed --master_port=N, torchrun --master-port=N, or "
            "MASTER_PORT=N in the environment"
        ) from error
    try:
        socket.create_connection((address, store.port), OWN_LIMIT_S).close()
    except OSError as error:
        raise ValueError(
            f"rank 0 on {socket.gethostname()} does not reach what it serves itself at MASTER_ADDR={address}, port "
            f"{port} ({error}): give the name or the address of rank 0's host"
        ) from None  # which might pass by itself, but the address does not
    return store


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _started(rank: int) -> str:
    return f"mvptr_ds/started/{rank}"


def _me() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
