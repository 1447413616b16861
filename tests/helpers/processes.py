"""Ranks of torch.distributed, and Ray's processes of this test."""

import contextlib
import datetime
import multiprocessing
import os
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def join(rank, world, folder, timeout_s=1800):
    torch.set_num_threads(1)
    store, timeout = dist.FileStore(str(folder / "store"), world), datetime.timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)


def leave():
    """Together: a rank that ends first would take the others' connections with it."""
    dist.barrier()
    dist.destroy_process_group()


def forks() -> multiprocessing.context.BaseContext:
    """Starts processes as forks of a server that has imported all they need: once, not once a process."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.forked"])
    return context


def run_ranks(target, world, folder, *args):
    """`target(rank, world, folder, *args)` in a process for each rank."""
    forks()
    mp.start_processes(target, args=(world, folder, *args), nprocs=world, start_method="forkserver")


def running(title: str) -> list[psutil.Process]:
    """Ray's actors of a class, of the Ray and the commands that this test started alone."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may just have ended
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found
