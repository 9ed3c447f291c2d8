"""Peak memory of a piece of work, each in a process of its own."""

import ctypes
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import psutil

T = TypeVar("T")
PRELOAD = ["torch", "deepspeed", "peft", "cal_train.train.trainer", "cal_train.testing"]
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Return ``function(*arguments)``, run in a process that has done nothing but import.

    A process that measured before would keep freed memory and hide the next peak. The children are forked from a
    server that has imported everything, so that each costs no start-up.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return pool.submit(function, *arguments).result()


def give_back_at_once() -> None:
    """Let glibc return every larger block to the system when it is freed, for the rest of this process.

    By default it raises its limit up to 32 MiB as blocks are freed and keeps what lies below: the resident memory is
    then that of its gaps as well. Does nothing under another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**16)


def peak_growth(work: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory of this process peaks, while working, above where it stands now.

    To be called once per process, and before anything larger than ``work`` has run: the system keeps one peak for the
    life of a process.
    """
    before = psutil.Process().memory_info().rss
    work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak - before
