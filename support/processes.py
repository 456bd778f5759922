"""What the processes of a torchrun tell each other. Without torchrun there is one, and nothing here
does anything."""

import atexit
import os
import sys

import torch
import torch.distributed as dist

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
