"""Training jobs that take turns, a few steps each: what disturbs the machine disturbs all of them, so ratios stay.

`take_turns` starts jobs that each live through the whole measurement and lets some of them go for three steps, of which
the first, which finds the caches full of another job's memory, is not counted: one job after another, or two at the
same time. A job reads its batches from `own_turns`, which waits, without using a core, until it
is the job's turn.
"""

from __future__ import annotations

import collections
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

VARIABLE = "TURNS"  # of a job's environment: where the store is, which job this is, whose turns come when
PATIENCE = datetime.timedelta(minutes=20)
PAUSE_S = 0.05
GO = "go"
WARM_UP = 2  # rounds that are not counted
STEPS = 3  # of a turn
Start = Callable[[Mapping[str, str]], None]


def take_turns(jobs: Mapping[str, Start], turns: Sequence[Sequence[str]], rounds: int) -> dict[tuple[str, int], Any]:
    """Seconds of the steps by (job, place of the turn in `turns`), of all rounds but the first two.

    `jobs`: name → what starts the job with these variables in its environment and returns at its end. In each round
    every entry of `turns` comes once: the jobs that it names take their steps, at the same time. A job ends after its
    last step and no sooner than all others. Raises what a job that fails does.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    told = {"port": store.port, "turns": [list(turn) for turn in turns], "rounds": rounds}
    seconds: dict[tuple[str, int], list[float]] = collections.defaultdict(list)
    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(start, {VARIABLE: json.dumps({**told, "name": name})}) for name, start in jobs.items()]
        try:
            _wait_for(store, [f"ready/{name}" for name in jobs], running)
            for number in range(rounds * len(turns)):
                place = number % len(turns)
                store.set(f"go/{number}", GO)
                _wait_for(store, [f"done/{number}/{name}" for name in turns[place]], running)
                for name in turns[place]:
                    if number >= WARM_UP * len(turns):
                        seconds[name, place].append(float(store.get(f"done/{number}/{name}")))
        except BaseException:
            for number in range(rounds * len(turns)):
                store.set(f"go/{number}", "the others have failed")
            raise
        store.set("end", "")
        for job in running:
            job.result()
    return seconds


def own_turns(batch: Any) -> Iterator[Any]:
    """`batch` again and again, by a rank of a job in its turns; the first rank tells how long the steps took.

    A step is all that the job does between two batches.
    """
    told = json.loads(os.environ[VARIABLE])
    store = dist.TCPStore("127.0.0.1", told["port"], is_master=False, timeout=PATIENCE)
    name, turns = told["name"], told["turns"]
    dist.barrier()
    if dist.get_rank() == 0:
        store.set(f"ready/{name}", "")
    for number in range(told["rounds"] * len(turns)):
        if name in turns[number % len(turns)]:
            if (word := store.get(f"go/{number}").decode()) != GO:  # it waits for the word
                raise RuntimeError(word)
            dist.barrier()
            yield batch
            began = time.perf_counter()
            for _ in range(STEPS - 1):
                yield batch
            if dist.get_rank() == 0:
                store.set(f"done/{number}/{name}", str((time.perf_counter() - began) / (STEPS - 1)))
    store.wait(["end"])


def steps_of(name: str, turns: Sequence[Sequence[str]], rounds: int) -> int:
    """How many steps a job takes."""
    return STEPS * rounds * sum(name in turn for turn in turns)


def _wait_for(store: Any, names: list[str], running: Sequence[Future[None]]) -> None:
    while not store.check(names):
        for job in running:
            if job.done():
                job.result()
                raise RuntimeError(f"a job has ended before its last turn, at {names}")
        time.sleep(PAUSE_S)
