"""Memory of batches that is used again as soon as no tensor lies in it any more.

A batch is megabytes, which the C library asks of the operating system anew each time; page by page, that costs more
than copying into it does (and far more in a virtual machine).
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict, deque
from functools import partial

import numpy as np
import torch

KEPT = 3  # pieces of one size that wait for their next use: what a loader has in hand; more go back to the system
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
