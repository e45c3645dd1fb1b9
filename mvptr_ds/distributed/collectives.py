"""Ranks: start-up, and the few collectives that training needs.

With one process every collective is the identity, so nothing else asks how many ranks there are.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mvptr_ds.distributed.rendezvous import ANY_PORT, check_place, deadline, rendezvous
from mvptr_ds.errors import portable

logger = logging.getLogger(__name__)
T = TypeVar("T")

if not torch.cuda.is_available():  # deepspeed picks its accelerator when it is first imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


POLL_S = 5.0  # how long a collective of ranks that wait for another's work lasts at most
_timed: Callable[[], AbstractContextManager[Any]] = nullcontext


def time_collectives(timer: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Runs every later collective of tensors within `timer()`; without argument none is timed."""
    global _timed
    _timed = timer


def init(
    collectives_timeout_s: float = 2400.0, start_within_s: float = 0.0, connect_within_s: float = 0.0
) -> torch.device:
    """Joins the process group that the launcher described (or makes one of a single rank); returns this rank's device.

    Every launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT will do: `deepspeed`,
    `torchrun`; or `srun` with a task a rank. Without one the process is the only rank.

    Args:
        collectives_timeout_s: how long a collective may wait for a rank; DEEPSPEED_TIMEOUT (minutes) counts before it.
        start_within_s: how long the first rank waits for the last one to start; 0: no limit.
        connect_within_s: how long it may take from then to the end of the first collective; 0: no other limit.
            Past either the process ends with 1 and a message.

    Raises:
        ValueError: what describes the group is not complete, or leads nowhere.
    """
    take_place_from_slurm(os.environ)
    check_place(os.environ)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # deepspeed 0.19.8 calls two collectives by their names of before torch 2.13, which say so once a process
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning
    )

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=ANY_PORT)
    if torch.cuda.is_available():
        if torch.cuda.device_count() == 1:  # srun may show each task only its own device, which then has number 0
            os.environ["LOCAL_RANK"] = "0"
        local_rank, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_devices:
            raise ValueError(
                f"LOCAL_RANK is {local_rank}, but this process sees {num_devices} GPUs: start as many ranks a node as "
                "it has GPUs (deepspeed --num_gpus, RANKS_PER_NODE; CUDA_VISIBLE_DEVICES may hide some)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _skip_shm_comm(deepspeed)
        if "OMP_NUM_THREADS" not in os.environ:  # ranks of one machine share its cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_SIZE", "1"))))
    if not dist.is_initialized():
        timeout = _asked_timeout() or timedelta(seconds=collectives_timeout_s)
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = rendezvous(start_within_s)
        with deadline(connect_within_s, "the first exchange between the ranks"):
            deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
            barrier()
        del store  # rank 0 had to serve it until the engine's backend has another
    return device


def _asked_timeout() -> timedelta | None:
    asked = os.environ.get("DEEPSPEED_TIMEOUT")
    try:
        return timedelta(minutes=float(asked)) if asked else None
    except (ValueError, OverflowError) as error:
        raise ValueError(f"DEEPSPEED_TIMEOUT is {asked!r} in the environment, must be a number of minutes") from error


def take_place_from_slurm(environment: MutableMapping[str, str]) -> None:
    """Sets RANK and the like where `srun` started this process as one task of several, and no launcher has set them.

    The step's own variables alone say so: SLURM_PROCID and SLURM_NTASKS are also set in a batch script and in an
    interactive shell, where a plain `python` is the only rank. Rank 0 is on the step's first node.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or tasks < 2:
        return
    # below Linux' ephemeral ports; jobs that share a node differ, so do the steps of a job
    port = 20_000 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])) % 10_000
    environment.update(RANK=environment["SLURM_PROCID"], LOCAL_RANK=environment["SLURM_LOCALID"], WORLD_SIZE=str(tasks))
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(port))


def first_host(nodelist: str) -> str:
    """Returns the first name of SLURM's short form of a list: `gpu[07-09,12],login` -> `gpu07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    assert first is not None, nodelist
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _skip_shm_comm(deepspeed: Any) -> None:
    """Keeps DeepSpeed from compiling its shared-memory collective, which training never calls.

    The build takes minutes, and one that is killed leaves a lock on which every later run waits for ever. The
    registry is private, hence the guard; constraints.txt pins the version it was read in.
    """
    ops = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(ops, dict) and "deepspeed_shm_comm" in ops:
        ops["deepspeed_shm_comm"] = False


def launched_as_main() -> bool:
    """Returns whether the launcher made this process rank 0; also true before `init`, and where RANK is no number."""
    rank = os.environ.get("RANK", "0")
    return not rank.isdigit() or int(rank) == 0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if num_ranks() > 1:
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's value, which is picklable and small, on every rank."""
    if num_ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Returns the values of all ranks, picklable and small, in the order of ranks on every rank."""
    if num_ranks() == 1:
        return [value]
    out: list[Any] = [None] * num_ranks()
    dist.all_gather_object(out, value)
    return out


def of_main(function: Callable[[], T]) -> T:
    """Returns what a short `function` gives on rank 0, on every rank; its error is raised on every rank."""
    if num_ranks() == 1:
        return function()
    value, error = None, None
    if is_main():
        try:
            value = function()
        except Exception as caught:  # whatever it is: the others wait
            error = portable(caught)
    value, error = broadcast_object((value, error))
    if error is not None:
        raise error
    return value


def run_on_rank_zero(function: Callable[[], object], alive: Callable[[], None] | None = None) -> None:
    """Runs `function` on rank 0 while the others wait; its error is raised on every rank.

    It may take hours, as the index of a large folder does. Of several ranks, 0 runs it in a thread of its own: it uses
    no collective itself.

    Args:
        alive: called all the while, on every rank.
    """
    if num_ranks() == 1 and alive is None:
        function()
        return
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(function) if is_main() else None
        wait_for_all(work, alive)
    error = None if work is None else work.exception()
    error = broadcast_object(None if error is None else portable(error))
    if error is not None:
        raise error


def wait_for_all(work: Future[Any] | None, alive: Callable[[], None] | None = None) -> None:
    """Waits until the work of every rank is done, well or not; of a rank that has none: None.

    However long it takes, they wait in one short collective after the other, so that none runs into its time limit.

    Args:
        alive: called after each of them.
    """
    done = False
    while not done:
        done = all(gather_objects(work is None or bool(wait([work], POLL_S).done)))
        if alive is not None:
            alive()


def all_reduce_sum(value: Tensor) -> Tensor:
    """Returns the sum over ranks, without gradient; `value` itself is left alone."""
    if num_ranks() == 1:
        return value.detach()
    total = value.detach().clone()
    with _timed():
        dist.all_reduce(total)
    return total


def all_to_all(rows: Tensor, num_sent: list[int], num_got: list[int]) -> Tensor:
    """Rows in the order of the ranks that they go to -> rows in the order of the ranks they come from; no gradient.

    Args:
        num_sent, num_got: rows for and from each rank; what one sends, the other expects.
    """
    got = rows.new_empty(sum(num_got), *rows.shape[1:])
    with _timed():
        dist.all_to_all_single(got, rows.contiguous(), num_got, num_sent)
    return got


def _all_gather(local: Tensor) -> Tensor:
    joined = local.new_empty(num_ranks(), *local.shape)
    with _timed():
        dist.all_gather(list(joined.unbind()), local.contiguous())
    return joined.flatten(0, 1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return _all_gather(local)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (grad,) = grads
        own = torch.empty_like(grad.chunk(num_ranks())[rank()])
        with _timed():
            dist.reduce_scatter(own, list(grad.contiguous().chunk(num_ranks())))
        return own


def gather(local: Tensor) -> Tensor:
    """Concatenates every rank's tensor along dim 0, in the order of ranks; equal shapes on all ranks.

    The gradient of a rank's part is the sum over all ranks of the gradients that reached it. With losses that are
    local sums over a global count, and DeepSpeed's mean over ranks undone by a factor of `num_ranks()`, that is the
    gradient of one process holding the whole batch.
    """
    if num_ranks() == 1:
        return local
    if not local.is_floating_point() or not local.requires_grad:
        as_int = local.to(torch.uint8) if local.dtype == torch.bool else local
        return _all_gather(as_int).to(local.dtype)
    out: Tensor = _Gather.apply(local)
    return out
