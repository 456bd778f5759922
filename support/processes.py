"""The processes of a torchrun, what they tell each other, and those that read images for them.
Without torchrun there is one process, and what passes between processes does nothing."""

import atexit
import os
import signal
import sys
from collections.abc import Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, get_worker_info

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
MAIN = RANK == 0  # the process that writes, and prints


def start(device):
    """Meets the other processes: gloo on CPUs, nccl for tensors on GPUs, of which each process
    takes its own."""
    if WORLD == 1 or dist.is_initialized():
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    atexit.register(dist.destroy_process_group)
    if not MAIN:
        sys.stdout = open(os.devnull, "w")


def gather(value):
    """-> the list of every process's value, in order of rank. Nobody goes on before all have come
    here."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


def add_up(tensors):
    """Each tensor becomes its sum over all processes, in one message."""
    if WORLD == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(total.view_as(t))


# ---- Processes that read images ----------------------------------------------------------------

def reader(dataset, workers, collate=None, **options):
    """-> torch's DataLoader with that many `workers`, which may start in any way: "fork", "spawn"
    or "forkserver". files.run makes one line of a worker's death."""
    return DataLoader(dataset, num_workers=workers, collate_fn=partial(shared, collate),
                      worker_init_fn=leave_interrupts, **options)


def shared(collate, items):
    """collate(items), whose tensors already lie in shared memory. Want of it is then an error that
    reaches the run; the thread that sends them would print the error and send nothing."""
    batch = collate(items) if collate else items
    if get_worker_info():
        values = batch.values() if isinstance(batch, dict) else batch
        for value in values if isinstance(values, Iterable) else ():
            if torch.is_tensor(value):
                value.share_memory_()
    return batch


def leave_interrupts(worker):
    """Ctrl-C reaches every process of a terminal. The one that trains decides what it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
