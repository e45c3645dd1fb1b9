"""The ranks' first contact, with limits of its own: that all of them start, that they reach each other."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

logger = logging.getLogger(__name__)
WEEK_S = 7 * 86_400.0
NUM_NAMED = 8


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


def meet(within_s: float) -> dist.Store | None:
    """Waits until every rank has started: from then on a short limit tells a network that fails from a slow start.

    Ends this process with 1 and a message when that takes longer; rank 0's names those that are missing.

    Args:
        within_s: 0 for no limit.

    Returns:
        What shows it, served by rank 0 as long as it holds it, at MASTER_ADDR and MASTER_PORT; None for one rank.
    """
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_ranks == 1:
        return None
    address, port, started_s = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), time.monotonic()
    limit = timedelta(seconds=within_s if within_s > 0 else WEEK_S)
    # torchrun serves one itself, to all ranks; like torch's own `env://`, whose store then joins this one at its port
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = None
    try:
        store = dist.TCPStore(address, port, num_ranks, serves, limit, wait_for_workers=False, multi_tenant=True)
        store.set(_started(rank), "")
        if store.add("mvptr_ds/num_started", 1) == num_ranks:
            store.set("mvptr_ds/all_started", "")
        store.wait(["mvptr_ds/all_started"], limit)
    except dist.DistError as error:
        if time.monotonic() < started_s + limit.total_seconds():
            raise
        if store is not None and rank == 0:
            missing = [str(other) for other in range(num_ranks) if not store.check([_started(other)])]
            named = ", ".join(missing[:NUM_NAMED]) + (" ..." if len(missing) > NUM_NAMED else "")
            why = f"{len(missing)} of {num_ranks} ranks have not started: {named}; see their logs"
        else:
            why = f"it waits in vain at {address}:{port}, rank 0's ({error}); see rank 0's log"
        logger.error("error: %s: after %.0f s (train.start_timeout_s) %s", _me(), within_s, why)
        raise SystemExit(1) from error
    return store


def _started(rank: int) -> str:
    return f"mvptr_ds/started/{rank}"


def _me() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
