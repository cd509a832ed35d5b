"""Several GPUs and machines: who this process is, and how ranks agree. With one process, everything here does
nothing.

    torchrun --nproc-per-node 8 train.py ...
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...

Samplers and stores are replicated: every rank makes the same draw from the same state, generates and scores its
slice of the prompts with an engine of its own, and is handed everyone's groups. The trainer is sharded by FSDP2.
"""

import contextlib
import os
import select
import signal
import stat
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

RANK = 0  # of this process, and how many there are; `start` sets them
WORLD = 1
PATIENCE = timedelta(minutes=30)  # a rank that died is noticed by its peers at once; one that is stuck, after this long


def start() -> None:
    """Joins the process group that torchrun has prepared. Before anything else that may make one (vLLM
    does)."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    device = None
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=PATIENCE, device_id=device)
    global RANK, WORLD
    RANK = dist.get_rank()
    WORLD = dist.get_world_size()


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    return RANK == 0


def barrier() -> None:
    if WORLD > 1:
        dist.barrier()


def share(items: list) -> list:
    """This rank's part of a list that all ranks have."""
    return items[RANK::WORLD]


def gather(items: list) -> list:
    """The list whose `share` each rank holds, in its first order, on every rank."""
    if WORLD == 1:
        return items
    parts: list[list] = [[] for _ in range(WORLD)]
    dist.all_gather_object(parts, items)
    total = sum(len(part) for part in parts)
    return [parts[i % WORLD][i // WORLD] for i in range(total)]


def from_main(value):
    """Rank 0's value, on every rank."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def on_main(function):
    """Calls `function` on rank 0 alone, which gets its result. All ranks raise ValueError where it does, or OSError."""
    if WORLD == 1:
        return function()
    result = None
    message = ""
    if is_main():
        try:
            result = function()
        except (ValueError, OSError) as error:
            message = str(error)
    message = from_main(message)
    if message:
        raise ValueError(message)
    return result


def total(values: list[float]) -> list[float]:
    """Sums over ranks."""
    sums = torch.tensor(values, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def largest(value: float) -> float:
    """Over ranks."""
    most = torch.tensor(float(value), dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def agree(value) -> bool:
    """Whether all ranks have the same value; every rank has to ask."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)


@contextlib.contextmanager
def peers():
    """ConnectionError, in one line, where another rank has died or is stuck. It keeps the notes of the error that
    torch raises then, which is a RuntimeError, from whatever needed the other rank."""
    try:
        yield
    except RuntimeError as error:
        what = " ".join(str(error).split())
        if WORLD == 1 or not (isinstance(error, dist.DistError) or "gloo" in what):
            raise
        lost = ConnectionError(f"rank {RANK} has lost another rank, which died or is stuck ({what[-200:]})")
        lost.__notes__ = getattr(error, "__notes__", [])
        raise lost from error


class Stop:
    """Ctrl-C, SIGTERM and a closed terminal let the step in hand finish, then the run is saved and left; a
    second one stops at once."""

    def __init__(self):
        self.signal = 0
        signal.signal(signal.SIGINT, self.note)
        signal.signal(signal.SIGTERM, self.note)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(signal.SIGHUP, self.note)

    def note(self, number, _frame):
        if number == signal.SIGHUP:
            leave_terminal()
        if self.signal:
            raise KeyboardInterrupt(number)
        self.signal = number
        message = "stopping after this step; once more to stop at once"
        if WORLD > 1:
            message += " (torchrun waits 30 s for it, or --shutdown-timeout)"
        tqdm.write(message, file=sys.stderr)

    def agreed(self) -> int:
        """The signal that any rank has had, so that all of them leave after the same step."""
        if WORLD == 1:
            return self.signal
        return int(largest(self.signal))  # never assigned: a signal that comes right now must not be lost


def after_in_child() -> None:
    """A process that is forked from a run, as of a pool in a user's reward, ends by SIGTERM: `Pool` counts on it, and
    its `with` would wait for ever for a worker that goes on. Ctrl-C still lets the step in hand finish."""
    if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Stop):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=after_in_child)


def leave_terminal() -> None:
    """Output to a terminal, and to a pipe whose reader is gone, goes nowhere from now on: to write there raises
    OSError. Files stay."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for handle in (1, 2):
        broken = select.poll()
        broken.register(handle, 0)
        if stat.S_ISCHR(os.fstat(handle).st_mode) or broken.poll(0):
            os.dup2(nowhere, handle)
    os.close(nowhere)


def lost_reader() -> None:
    """A console that nobody reads any more is a closed terminal."""
    leave_terminal()
    signal.raise_signal(signal.SIGHUP)  # where the run ends by it; under nohup it goes on


def shard(module: torch.nn.Module, layers: list[torch.nn.Module], bfloat16: bool) -> None:
    """Shards parameters, gradients and optimiser states over all ranks, each of `layers` on its own;
    weights stay in float32, computation is in bfloat16, gradients are reduced in float32.

    The weights are those of the first rank. Of the others none needs memory for more than a layer, and its shards.
    """
    if WORLD == 1:
        return
    options = {}
    if bfloat16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for part in [*layers, module]:
        for weight in part.parameters():
            if not isinstance(weight, DTensor):
                weight.data = weight.data.to(device)
                dist.broadcast(weight.data, 0)
        fully_shard(part, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded parameter; every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
