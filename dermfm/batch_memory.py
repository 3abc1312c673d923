"""Memory that is used again as soon as no tensor lies in it any more: that of batches, and what a step frees.

A batch is megabytes, which the C library asks of the operating system anew each time; page by page, that costs more
than copying into it does (and far more in a virtual machine).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections import defaultdict, deque
from functools import partial

import numpy as np
import torch

KEPT = 3  # pieces of one size that wait for their next use: what a loader has in hand; more go back to the system
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_waiting: defaultdict[int, deque[np.ndarray]] = defaultdict(partial(deque, maxlen=KEPT))


def take(*shape: int) -> torch.Tensor:
    """uint8 tensor of `shape`, its content arbitrary; its memory is taken again once nothing refers to it."""
    waiting = _waiting[math.prod(shape)]
    try:
        piece = waiting.pop()
    except IndexError:
        piece = np.empty(math.prod(shape), dtype=np.uint8)
    lent = piece[:]  # an object of its own, held by the tensor's storage and by nothing else: it ends with all views
    weakref.finalize(lent, waiting.append, piece).atexit = False
    return torch.from_numpy(lent).view(shape)


def keep_freed() -> None:
    """Let this process keep what it frees, of any size, for what it asks for next. glibc only.

    Gradients, shares and activations of a step on a CPU are freed and asked for again in the next one: a CNN's maps at
    a micro-batch of 32 are 80 MB each, and to be given 20,000 empty pages takes longer than to fill them.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)  # nothing lies outside of the heap, where what is freed would be given back
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
