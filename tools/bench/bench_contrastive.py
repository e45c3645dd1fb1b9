#!/usr/bin/env python3
"""What VSC and hard negatives cost a rank as the global batch grows, against the plain gather of everything.

    python tools/bench/bench_contrastive.py
    python tools/bench/bench_contrastive.py --global-batch 512 --per-rank 256 --gloo     # real ranks

The package's own code runs as rank 0, forward and backward. With simulated ranks, the three collectives of
torch.distributed are replaced by ones that hand out what the others would have sent (tensors drawn for it) and count
bytes; with --gloo they are real ones, on this machine, counted alike. Each figure comes from a process of its own:

    bytes   that the rank receives from others in a micro-batch, forward and backward: counted, exact
    memory  the largest growth of the process's resident memory above its inputs, every large tensor mapped by itself
    time    CPU-seconds on one thread, the median of the repeats: a busy machine changes them little; no waiting in it

Against them stands the plain gather of everything: the states of all ranks, padded to their limits, and VSC of the
whole global batch on every rank. Where it needs more than --max-gib it is computed from the shapes, as a lower bound.

Legend: B samples of this rank, N of all ranks, R ranks, T text slots, S slots of states, D hidden.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.distributed import collectives as parallel
from mvptr_ds.model.sequence_index import SequenceIndex
from mvptr_ds.objectives.candidates import Candidates, Globals
from mvptr_ds.objectives.gather_rows import PendingExchanges, Request
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.terminal import accept_any_text

TEXT_SLOTS, REGIONS = 40, 50  # the padding limits of configs/base.yaml
TEXT_LENGTHS, REGION_LENGTHS = (10, 28), (10, 50)  # slots that captions and images fill, drawn evenly
PARTS = {
    "VSC": "vsc",
    "VSC, a rank's rows at once": "vsc_rows",
    "VSC, all pairs on every rank": "vsc_plain",
    "choice, hardest": "hardest",
    "choice, sampled": "sampled",
    "choice, sampled, rows at once": "sampled_plain",
    "states of the chosen": "states",
    "states of all": "states_plain",
}
PART_LIMIT_S = 280.0


@dataclass(frozen=True)
class Setting:
    part: str
    num_ranks: int
    per_rank: int
    hidden: int
    scores_mib: float
    repeats: int
    gloo: bool


@dataclass
class Cost:
    gib: float
    seconds: float | None
    bytes_received: int
    computed: bool = False  # from shapes, not run


# --- what every rank holds: a function of its number, so that simulated ranks send what real ones would


def globals_of(rank: int, setting: Setting) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    both_2BD = torch.randn(2, setting.per_rank, setting.hidden, generator=generator)
    text_BD, image_BD = F.normalize(both_2BD, dim=-1)
    return text_BD, image_BD


def image_index_of(rank: int, setting: Setting) -> Tensor:
    return torch.arange(setting.per_rank) + rank * setting.per_rank


def lengths_of(rank: int, setting: Setting, limits: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(7_000_000 + 100 * rank + limits[1])
    return torch.randint(limits[0], limits[1] + 1, (setting.per_rank,), generator=generator)


def wanted_of(rank: int, setting: Setting, limits: tuple[int, int]) -> Tensor:
    """For each sample another one; for ITM every second one keeps its own (its text or its image)."""
    generator = torch.Generator().manual_seed(9_000_000 + 100 * rank + limits[1])
    num = setting.num_ranks * setting.per_rank
    negative_index_B = torch.randint(0, num, (setting.per_rank,), generator=generator)
    keeps_B = torch.arange(setting.per_rank) % 2 == (limits == TEXT_LENGTHS)
    return torch.where(keeps_B, image_index_of(rank, setting), negative_index_B)


@cache
def told_of(rank: int, setting: Setting) -> Tensor:
    """Returns what a rank tells the others first: lengths and choices, of texts and of images; int64 [2, 2, B]."""
    limits = [of_slots for of_slots, _ in SLOTS]
    lengths, wanted = ([f(rank, setting, of) for of in limits] for f in (lengths_of, wanted_of))
    return torch.stack([torch.stack(lengths), torch.stack(wanted)])


# --- collectives that count, real or simulated


class Collectives:
    """Stands in the place of torch.distributed's functions, within this process; `received` counts bytes."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.received = setting, 0
        self.real = dist.all_gather, dist.reduce_scatter, dist.all_to_all_single
        self.globals_R: list[tuple[Tensor, Tensor]] = []
        if not setting.gloo:
            parallel.rank = lambda: 0
            parallel.num_ranks = lambda: setting.num_ranks
            if setting.part not in ("states", "states_plain"):
                self.globals_R = [globals_of(rank, setting) for rank in range(setting.num_ranks)]
        for name in ("all_gather", "reduce_scatter", "all_to_all_single"):
            setattr(dist, name, getattr(self, name))

    def all_gather(self, parts: list[Tensor], local: Tensor) -> None:
        self.received += local.nbytes * (len(parts) - 1)
        if self.setting.gloo:
            self.real[0](parts, local)
            return
        of_images = bool(self.globals_R) and not torch.equal(local, self.globals_R[0][0])
        for rank, part in enumerate(parts):
            if local.dtype == torch.int64:
                told = local.ndim == 4  # else the images of the global states
                part.copy_(told_of(rank, self.setting) if told else image_index_of(rank, self.setting))
            else:
                part.copy_(self.globals_R[rank][of_images] if self.globals_R else local)

    def reduce_scatter(self, own: Tensor, parts: list[Tensor]) -> None:
        self.received += own.nbytes * (len(parts) - 1)
        if self.setting.gloo:
            self.real[1](own, parts)
        else:
            own.copy_(parts[parallel.rank()])

    def all_to_all_single(self, out: Tensor, rows: Tensor, num_got: list[int], num_sent: list[int]) -> None:
        rank = parallel.rank()
        self.received += (out.nbytes // max(1, len(out))) * (sum(num_got) - num_got[rank])
        if self.setting.gloo:
            self.real[2](out, rows, num_got, num_sent)
        else:
            out.zero_()
            out.split(num_got)[rank].copy_(rows.split(num_sent)[rank])


# --- the parts


def pool_of(setting: Setting, scores_mib: float) -> Candidates:
    rank = parallel.rank()
    text_BD, image_BD = (states_BD.requires_grad_() for states_BD in globals_of(rank, setting))
    return Candidates(Globals(text_BD, image_BD, image_index_of(rank, setting)), "global", scores_mib)


def vsc(setting: Setting) -> Callable[[], None]:
    scale = torch.tensor([14.0], requires_grad=True)

    def once() -> None:
        pool_of(setting, setting.scores_mib).vsc(scale).sum.backward()

    return once


def vsc_rows(setting: Setting) -> Callable[[], None]:
    """Computes all of a rank's logits at once, left to autograd."""
    scale = torch.tensor([14.0], requires_grad=True)

    def once() -> None:
        pool = pool_of(setting, setting.scores_mib)
        own_B = torch.arange(setting.per_rank) + pool.first
        pairs = ((pool.local.text_ND, pool.all.image_ND), (pool.local.image_ND, pool.all.text_ND))
        losses = [F.cross_entropy(own_BD @ all_ND.T * scale, own_B, reduction="sum") for own_BD, all_ND in pairs]
        (0.5 * torch.stack(losses).sum()).backward()

    return once


def vsc_plain(setting: Setting) -> Callable[[], None]:
    """Computes the loss of the whole global batch on every rank."""
    scale = torch.tensor([14.0], requires_grad=True)

    def once() -> None:
        pool = pool_of(setting, setting.scores_mib)
        logits_NN = pool.all.text_ND @ pool.all.image_ND.T * scale
        own_N = torch.arange(len(logits_NN))
        (0.5 * (F.cross_entropy(logits_NN, own_N) + F.cross_entropy(logits_NN.T, own_N))).backward()

    return once


def choice(setting: Setting, mode: str, scores_mib: float) -> Callable[[], Any]:
    """Measures the choice alone: VSC has gathered the global states already."""
    pool = pool_of(setting, scores_mib)
    images_K, texts_K = (torch.arange(first, setting.per_rank, 2) for first in (0, 1))
    uniform_B = torch.rand(setting.per_rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = torch.tensor([14.0])

    def once() -> None:
        pool.negative_images(mode, uniform_B, scale, images_K)
        pool.negative_texts(mode, uniform_B, scale, texts_K)

    return once


SLOTS = ((TEXT_LENGTHS, TEXT_SLOTS), (REGION_LENGTHS, REGIONS))


def states_of(num_rows: int, setting: Setting) -> Tensor:
    return torch.ones(num_rows, setting.hidden, dtype=torch.bfloat16, requires_grad=True)


def states(setting: Setting) -> Callable[[], None]:
    """Exchanges ITM's other texts and images with the text's phrase mask, forward and backward."""
    rank = parallel.rank()
    asked = [
        Request(SequenceIndex(tuple(lengths_of(rank, setting, limits).tolist())), wanted_of(rank, setting, limits))
        for limits, _ in SLOTS
    ]
    text_ND, regions_ND = (states_of(sum(request.index.lengths), setting) for request in asked)
    phrase_mask_N = torch.zeros(len(text_ND), dtype=torch.bool)

    def once() -> None:
        to_text, to_regions = PendingExchanges(asked).read()
        to_text.fetch(phrase_mask_N)
        fetched = [to_text.fetch(text_ND), to_regions.fetch(regions_ND)]
        torch.stack([states_MD.sum() for states_MD in fetched]).sum().backward()
        text_ND.grad = regions_ND.grad = None

    return once


def states_plain(setting: Setting) -> Callable[[], None]:
    """Exchanges padded states and masks of all ranks."""
    rank, num = parallel.rank(), setting.per_rank
    padded = [states_of(num * slots, setting) for _, slots in SLOTS]
    wanted = [wanted_of(rank, setting, limits) for limits, _ in SLOTS]
    masks = [torch.zeros(num, slots, dtype=torch.bool) for slots in (TEXT_SLOTS, TEXT_SLOTS, REGIONS)]

    def once() -> None:
        for mask_BS in masks:
            parallel.gather(mask_BS)
        gathered = [parallel.gather(rows.unflatten(0, (num, -1))) for rows in padded]
        total = torch.stack(
            [all_NSD[negative_index_B].sum() for all_NSD, negative_index_B in zip(gathered, wanted, strict=True)]
        ).sum()
        del gathered  # as they are once the mismatched pairs are made
        total.backward()
        padded[0].grad = padded[1].grad = None

    return once


def prepare(setting: Setting) -> Callable[[], Any]:
    if setting.part in ("hardest", "sampled", "sampled_plain"):
        scores_mib = float("1e9") if setting.part == "sampled_plain" else setting.scores_mib
        return choice(setting, setting.part.removesuffix("_plain"), scores_mib)
    parts: dict[str, Callable[[Setting], Callable[[], None]]] = {
        "vsc": vsc, "vsc_rows": vsc_rows, "vsc_plain": vsc_plain, "states": states, "states_plain": states_plain
    }  # fmt: skip
    return parts[setting.part](setting)


# --- measuring, in a process of its own


def resident_gib(field: str) -> float:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 2**20


def measure(setting: Setting) -> Cost:
    if setting.gloo:
        dist.init_process_group("gloo")
    collectives = Collectives(setting)
    once = prepare(setting)
    once()  # libraries keep their work space from the first time on
    collectives.received = 0
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    before = resident_gib("VmRSS")
    seconds = []
    for _ in range(setting.repeats):
        begun_s = time.process_time()
        once()
        seconds.append(time.process_time() - begun_s)
    received, rest = divmod(collectives.received, setting.repeats)
    assert rest == 0, (collectives.received, setting.repeats)
    if setting.gloo:
        dist.barrier()
        dist.destroy_process_group()
    return Cost(resident_gib("VmHWM") - before, statistics.median(seconds), received)


def at_least(setting: Setting) -> Cost:
    """From the shapes of the plain parts: what must be there at once, and the bytes."""
    others, num = setting.num_ranks - 1, setting.num_ranks * setting.per_rank
    if setting.part == "vsc_plain":  # the logits, and the softmax of rows and of columns
        received = others * setting.per_rank * (2 * 2 * setting.hidden * 4 + 8)
        return Cost(3 * 4 * num**2 / 2**30, None, received, computed=True)
    elements = setting.per_rank * (TEXT_SLOTS + REGIONS) * setting.hidden  # bfloat16: gathered, then their gradient
    masks = setting.per_rank * (2 * TEXT_SLOTS + REGIONS)
    return Cost(2 * elements * setting.num_ranks / 2**30, None, others * (2 * 2 * elements + masks), computed=True)


def in_processes(setting: Setting) -> Cost:
    """Returns the figure of rank 0.

    Raises:
        RuntimeError: a process failed, or did not end in time.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    large_tensors_apart = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = (
        os.environ | large_tensors_apart | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    )
    processes = []
    for rank in range(setting.num_ranks if setting.gloo else 1):
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": str(setting.num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, __file__, "--measure", json.dumps(asdict(setting))]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment | place, **pipes))
    try:
        outputs = [process.communicate(timeout=PART_LIMIT_S) for process in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{setting} still ran after {PART_LIMIT_S:.0f} s") from None
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{setting} ended with {process.returncode}:\n{errors[-2000:]}")
    return Cost(**json.loads(outputs[0][0].splitlines()[-1]))


# --- the table


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| global batch | ranks | part | received, MiB | peak memory, MiB | CPU-s |")
    print("| ---: | ---: | --- | ---: | ---: | ---: |")
    for row in rows:
        about = "≥ " if row["computed"] else ""
        seconds = "not run" if row["seconds"] is None else f"{row['seconds']:.3f}"
        print(
            f"| {row['global_batch']:,} | {row['num_ranks']} | {row['part']} | {row['bytes_received'] / 2**20:,.1f} "
            f"| {about}{row['gib'] * 1024:,.1f} | {seconds} |"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--global-batch", type=int, nargs="+", default=[512, 4096, 32768], metavar="N")
    parser.add_argument("--per-rank", type=int, default=64, help="samples of a rank's micro-batch (default 64)")
    parser.add_argument("--hidden", type=int, default=768, help="width of the states (default 768)")
    parser.add_argument("--scores-mib", type=float, default=16.0, help="task.scores_mib (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="the time is their median (default 1)")
    parser.add_argument("--max-gib", type=float, default=1.0, help="above it `states of all` is computed (default 1)")
    parser.add_argument("--gloo", action="store_true", help="real ranks on this machine: for a few ranks")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS.values()), default=list(PARTS.values()))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    accept_any_text()
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.measure:
        print(json.dumps(asdict(measure(Setting(**json.loads(arguments.measure))))))
        return 0
    rows: list[dict[str, Any]] = []
    try:
        for name, num in (
            bar := progress_bar([(p, n) for n in arguments.global_batch for p in arguments.parts], leave=False)
        ):
            if num % arguments.per_rank:
                raise ValueError(f"--global-batch {num} is no multiple of --per-rank {arguments.per_rank}")
            bar.set_description(f"{name} at {num}")
            setting = Setting(
                name, num // arguments.per_rank, arguments.per_rank, arguments.hidden, arguments.scores_mib,
                arguments.repeats, arguments.gloo,
            )  # fmt: skip
            bound = at_least(setting) if name in ("vsc_plain", "states_plain") else None
            cost = bound if bound is not None and bound.gib > arguments.max_gib else in_processes(setting)
            title = next(title for title, part in PARTS.items() if part == name)
            rows.append({"global_batch": num, "num_ranks": setting.num_ranks, "part": title, **asdict(cost)})
    except (RuntimeError, ValueError) as error:
        logging.error("error: %s", error)
        return 2
    print_table(rows)
    print(json.dumps({"per_rank": arguments.per_rank, "hidden": arguments.hidden, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
