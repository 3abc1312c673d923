"""Processes that share the cores of this machine: each computes on one thread.

The products of small matrices in keypoints.py and measure/ gain nothing from BLAS's own threads; on a machine that is
busy, with these very processes for example, threads that wait for each other make them many times slower.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import cv2
import numpy as np  # noqa: F401  (threadpoolctl sees only libraries that are loaded)
from threadpoolctl import threadpool_limits

PARENT_LOOK_S = 2.0
POOL_FROM = 512  # items; fewer are done in this process

Mapped = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@functools.cache
def one_thread() -> None:
    """Keep OpenCV and BLAS in this process to one thread from now on."""
    cv2.setNumThreads(1)
    threadpool_limits(limits=1)


@contextmanager
def mapping(workers: int, num_items: int) -> Iterator[Mapped]:
    """A `map` in order over so many processes (0: one a core), or in this one for few items or one worker.

    Processes are spawned: a fork of a process with threads may stand still.
    """
    workers = workers or os.cpu_count() or 1
    if workers == 1 or num_items < POOL_FROM:
        with threadpool_limits(limits=1):
            yield map
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),))
    with pool:
        yield pool.map


def _begin(parent: int) -> None:
    """One thread, and an end with the parent: a killed one leaves its processes waiting for work for ever."""
    one_thread()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_LOOK_S)
    os._exit(1)
