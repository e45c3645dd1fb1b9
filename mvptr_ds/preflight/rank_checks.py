"""Checks that ranks make together: whether they reach each other, and whether they are alike."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from mvptr_ds.distributed import collectives
from mvptr_ds.errors import may_pass

OK, WARNING, ERROR = "ok", "warning", "error"
MAX_SKEW_S = 2.0
SLOW_GB_PER_S = 1.0  # for NCCL: the speed of ordinary Ethernet
SEEN_WITHIN_S = 5.0  # network storage may show a new file late


@dataclass(frozen=True)
class Finding:
    """Holds one line of the report: the check, its level and text, and the remedy of a problem."""

    check: str
    level: str
    text: str
    remedy: str = ""
    passes: bool = False  # whether the same command may succeed later

    @classmethod
    def of(cls, check: str, error: Exception) -> Finding:
        """Makes a finding of an error that was raised."""
        return cls(check, ERROR, str(error), passes=may_pass(error))


Check = Callable[[], Iterable[Finding]]


def on_each(name: str, check: Check) -> list[Finding]:
    """Returns the findings of every rank, on every rank. Those that only some ranks have are prefixed with these ranks.

    A ValueError or OSError, which a user causes, is a finding like the others. `check` makes no collectives.
    """
    mine = _caught(name, check)
    findings: dict[Finding, list[int]] = {}
    hosts = collectives.gather_objects((socket.gethostname(), mine))
    for rank, (_, found) in enumerate(hosts):
        for finding in found:
            findings.setdefault(finding, []).append(rank)
    merged = []
    for finding, ranks in findings.items():
        if len(ranks) < collectives.num_ranks():
            where = _ranks(ranks, [host for host, _ in hosts])
            finding = replace(finding, text=f"{where}: {finding.text}")
        merged.append(finding)
    return merged


def on_first(name: str, check: Check) -> list[Finding]:
    """Returns the findings of rank 0, on every rank."""
    found: list[Finding] = collectives.broadcast_object(_caught(name, check) if collectives.is_main() else None)
    return found


def _caught(name: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except (ValueError, OSError) as error:
        return [Finding.of(name, error)]


def _ranks(ranks: list[int], hosts: list[str]) -> str:
    shown = ", ".join(f"{rank} ({hosts[rank]})" for rank in ranks[:4])
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def exchange(device: torch.device) -> list[Finding]:
    """Runs an all-reduce whose sum is known, and measures its speed."""
    num = collectives.num_ranks()
    if num == 1:
        return [Finding("all-reduce", OK, "one rank: nothing to exchange")]
    num_floats = (256 if device.type == "cuda" else 16) * 2**18  # 256 or 16 MiB of float32
    wanted, taken_s = num * (num + 1) / 2, float("inf")
    right = True
    for _ in range(3):
        values = torch.full((num_floats,), float(collectives.rank() + 1), device=device)
        collectives.barrier()
        started_s = time.perf_counter()
        dist.all_reduce(values)
        right = right and bool((values == wanted).all())  # this comparison waits for the device
        taken_s = min(taken_s, time.perf_counter() - started_s)
    wrong = [rank for rank, well in enumerate(collectives.gather_objects(right)) if not well]
    if wrong:
        text = f"the sum of {num} ranks' numbers is wrong on ranks {wrong}"
        return [Finding("all-reduce", ERROR, text, "leave out the nodes of these ranks and have them looked after")]
    gb_per_s = collectives.broadcast_object(2 * (num - 1) / num * 4 * num_floats / taken_s / 1e9)
    text = f"{num} ranks, {gb_per_s:.2f} GB/s a rank ({dist.get_backend()}, {4 * num_floats >> 20} MiB)"
    if device.type == "cuda" and gb_per_s < SLOW_GB_PER_S:
        remedy = "NCCL may have taken a slow network: see NCCL_DEBUG=INFO, name the fast one in NCCL_SOCKET_IFNAME"
        return [Finding("all-reduce", WARNING, text, remedy)]
    return [Finding("all-reduce", OK, text)]


def alike(name: str, values: Mapping[str, str], remedy: str) -> list[Finding]:
    """Checks that all ranks have the same values. A finding for each difference names the ranks."""
    all_values = collectives.gather_objects((socket.gethostname(), dict(values)))
    hosts, found = [host for host, _ in all_values], []
    for key in sorted({key for _, own in all_values for key in own}):
        owners: dict[str, list[int]] = {}
        for rank, (_, own) in enumerate(all_values):
            owners.setdefault(own.get(key, "missing"), []).append(rank)
        if len(owners) > 1:
            parts = "; ".join(f"{value} on {_ranks(ranks, hosts)}" for value, ranks in owners.items())
            found.append(Finding(name, ERROR, f"{key} differs: {parts}", remedy))
    return found or [Finding(name, OK, ", ".join(f"{key} {value}" for key, value in values.items()))]


def run_folder(folder: Path) -> list[Finding]:
    """Checks that every rank can write to the run folder and sees what rank 0 writes."""
    name = collectives.broadcast_object(f".preflight-{secrets.token_hex(4)}")

    def write() -> Iterator[Finding]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}-{collectives.rank()}").touch()
        yield Finding("run folder", OK, f"{folder} is written and seen by all ranks")

    def see() -> Iterator[Finding]:
        until_s = time.monotonic() + SEEN_WITHIN_S
        while not (folder / f"{name}-0").exists():
            if time.monotonic() > until_s:
                text = f"{folder} is another folder than rank 0's"
                remedy = "run.dir must lie on storage that all nodes share"
                yield Finding("run folder", ERROR, text, remedy)
                return
            time.sleep(0.1)

    found = on_each("run folder", write)
    if all(finding.level == OK for finding in found):
        seen = on_each("run folder", see)
        found = seen or found
    else:
        remedy = "set another run.dir, or get the rights to write there"
        found = [replace(f, text=f"run.dir={folder}: {f.text}", remedy=remedy) for f in found if f.level != OK]
    collectives.barrier()
    with suppress(OSError):
        (folder / f"{name}-{collectives.rank()}").unlink()
    return found


def clocks() -> list[Finding]:
    """Measures how far the ranks' clocks are apart: the least of five tries, since each contains a barrier's delay."""
    hosts = collectives.gather_objects(socket.gethostname())
    apart_s = float("inf")
    for _ in range(5):
        collectives.barrier()
        times = collectives.gather_objects(time.time())
        if max(times) - min(times) < apart_s:
            apart_s, first, last = max(times) - min(times), times.index(min(times)), times.index(max(times))
    if apart_s <= MAX_SKEW_S:
        return [Finding("clocks", OK, f"at most {max(apart_s, 0.001):.3f} s apart")]
    text = f"{apart_s:.1f} s apart: {_ranks([first], hosts)} is behind {_ranks([last], hosts)}"
    remedy = "times in logs do not compare, and files seem to come from the future: let the nodes keep time (chrony)"
    return [Finding("clocks", WARNING, text, remedy)]


def devices(device: torch.device) -> list[Finding]:
    """Checks that every rank has a GPU of its own, and that all GPUs are of one kind."""
    if device.type != "cuda":
        hosts = sorted(set(collectives.gather_objects(socket.gethostname())))
        return [Finding("devices", OK, f"{device.type} on {', '.join(hosts[:4])}{' ...' if len(hosts) > 4 else ''}")]
    own = str(torch.cuda.get_device_properties(device).uuid)
    held = collectives.gather_objects((socket.gethostname(), own, torch.cuda.get_device_name(device)))
    seats: dict[str, list[int]] = {}
    for rank, (_, uuid, _) in enumerate(held):
        seats.setdefault(uuid, []).append(rank)
    shared = [ranks for ranks in seats.values() if len(ranks) > 1]
    if shared:
        text = f"{_ranks(shared[0], [host for host, _, _ in held])} share one GPU"
        return [Finding("devices", ERROR, text, "start as many ranks a node as it has GPUs (RANKS_PER_NODE)")]
    names = sorted({name for _, _, name in held})
    if len(names) > 1:
        return [Finding("devices", WARNING, f"different GPUs: {', '.join(names)}", "the slowest sets the pace")]
    return [Finding("devices", OK, f"{len(held)} x {names[0]}")]
