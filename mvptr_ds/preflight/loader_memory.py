"""Checks that there is memory for the batches that loader processes hold ready."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

from mvptr_ds.config import Config
from mvptr_ds.data.sharing import SHARED_FOLDER, free_shared_bytes, without_folder
from mvptr_ds.distributed import collectives
from mvptr_ds.preflight.rank_checks import OK, WARNING, Finding, on_each

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # the memory limit of a container, or `max`
NAME = "loader memory"


def loader_memory(config: Config) -> list[Finding]:
    """Checks that each node has room for the batches that its loader processes hold ready. All ranks call it."""
    hosts = collectives.gather_objects(socket.gethostname())
    own = [rank for rank, host in enumerate(hosts) if host == socket.gethostname()]

    def check() -> Iterator[Finding]:
        if collectives.rank() == own[0]:  # one rank checks for its node
            yield _compare(config, len(own))

    return on_each(NAME, check)


def _compare(config: Config, num_ranks: int) -> Finding:
    data, train = config.data, config.train
    num_ready = max(0, data.num_workers) * max(1, data.prefetch_batches)
    each = largest_batch_bytes(config, train.batch_size // max(1, collectives.num_ranks() * train.accumulation_steps))
    needed, shared = num_ranks * num_ready * each, free_shared_bytes()
    if without_folder():
        room, remedy = _free_memory_bytes(), "give the job more memory"
        where = f"{_mib(room)} of memory are free; none of it comes from {SHARED_FOLDER} ({_mib(shared)} free)"
    else:
        room, remedy = shared, "give the container more (docker run --shm-size=8g, or --ipc=host)"
        where = f"{SHARED_FOLDER}, where they lie, has {_mib(room)} free"
    text = (
        f"batches held ready take up to {_mib(needed)} here: {num_ranks} ranks x {num_ready} batches x {_mib(each)}; "
        f"{where}"
    )
    if needed > room:
        lower = "lower data.num_workers, data.prefetch_batches or train.batch_size"
        return Finding(NAME, WARNING, text, f"{remedy}, or {lower}")
    return Finding(NAME, OK, text)


def largest_batch_bytes(config: Config, micro_batch: int) -> int:
    """Returns the bytes of a micro-batch whose samples fill all their slots, with features in float16 as in shards."""
    data, visual = config.data, config.visual
    text, tags = data.max_text_slots * (8 + 1 + 1 + 8 + 8), data.max_tag_slots * (8 + 1 + 8)
    pixels = 3 * visual.image_size**2 if visual.source == "image" else 0
    features = 2 * (visual.feature_dim or 0) if visual.source == "features" else 0
    regions = data.max_regions * (6 * 4 + 1 + features)
    return micro_batch * (text + tags + regions + pixels)


def _free_memory_bytes() -> int:
    """Returns the free memory of this machine, or of the container that limits this process."""
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    try:
        limit = CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return available
    return min(available, int(limit)) if limit.isdigit() else available


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
