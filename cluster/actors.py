"""A pool of Ray actors that work through leases; dead actors are replaced and what they held is leased again.

Each replica lives in a placement group of its own (cluster/replicas.py). A replica holds at most one lease that it
works on and one that waits, so memory stays flat however many leases there are. A dead replica costs the leases that it
held, not more: they go to the front of the queue. A lease that kills its replica again and again is cut in halves until
the one item that does it is alone; that item is given back as poisoned.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.ray import RayError
from cluster.replicas import Replica, ReplicaLost, Resources, room_for

K = TypeVar("K")
WAITING = 2  # leases a replica: one in work, one ready behind it
DEATHS_BEFORE_CUT = 3
STARTS_BEFORE_GIVING_UP = 3
POLL_S = 1.0
LOOK_EVERY_S = 15.0  # between looks for nodes that have joined
NOBODY_FOR_S = 600.0  # without any live replica for so long, the pool gives up


@dataclass(eq=False)
class Lease:
    """Items that one replica works on at once. `key` is the owner's name for it, `offset` its first item's place."""

    key: Any
    items: Sequence[Any]
    offset: int = 0
    deaths: int = 0


@dataclass(frozen=True)
class Done:
    """A finished piece of a lease: `results` are those of its items from place `offset` on; or the item is poisoned."""

    key: Any
    offset: int
    results: list[Any] | None
    items: Sequence[Any]
    error: str | None = None


def work_through(
    leases: Iterable[tuple[K, Sequence[Any]]],
    worker: type,
    arguments: tuple[Any, ...] = (),
    *,
    replicas: int | None = None,
    resources: Resources | None = None,
) -> Iterator[Done]:
    """Give every lease (key, items) to one of `replicas` replicas and yield what comes back, in the order it comes.

    `worker(*arguments)` is built once in each actor; `worker.work(items) -> list of results, one an item`. Where a
    replica has several actors, each gets `seat=(rank, world, host, port)` besides; `work` is called on rank 0 alone
    and `follow()` on the others, which returns only when rank 0 is gone. `replicas` null fills the cluster, and
    goes on filling it when nodes join. Each item's result is yielded exactly once. The actors end when the iterator
    is closed or exhausted. Raises RayError when replicas cannot be started, and whatever `work` itself raises, except
    ReplicaLost: that costs the replica, not the job.
    """
    pool = _Pool(worker, arguments, resources or Resources())
    try:
        yield from pool.run(iter(leases), replicas)
    finally:
        pool.close()


class _Pool:
    """The replicas, what they hold, and what waits."""

    def __init__(self, worker: type, arguments: tuple[Any, ...], resources: Resources) -> None:
        import ray

        self.resources, self.arguments = resources, arguments
        self.worker = ray.put(worker)
        self.replicas: list[Replica[Lease]] = []
        self.again: deque[Lease] = deque()
        self.failed_starts = 0
        self.last_alive = self.last_look = time.monotonic()
        self.has_more = True

    def run(self, leases: Iterator[tuple[Any, Sequence[Any]]], replicas: int | None) -> Iterator[Done]:
        """All leases, done."""
        source: Iterator[Lease] = (Lease(key, list(items)) for key, items in leases)
        first = list(itertools.islice(source, (replicas or room_for(self.resources)) * WAITING))
        source = itertools.chain(first, source)
        for _ in range(min(replicas or room_for(self.resources), len(first))):
            self._add()
        while True:
            self._hand_out(source)
            if not any(r.work for r in self.replicas) and not self.again:
                return
            yield from self._collect()
            if replicas is None:
                self._fill_cluster()

    def _add(self) -> None:
        self.replicas.append(Replica.start(self.worker, self.arguments, self.resources))

    def _fill_cluster(self) -> None:
        """A replica more for each that has room by now, while there are leases for it."""
        if time.monotonic() - self.last_look < LOOK_EVERY_S or not self.has_more:
            return
        self.last_look = time.monotonic()
        for _ in range(room_for(self.resources, at_least=0) - len(self.replicas)):
            self._add()

    def _hand_out(self, source: Iterator[Lease]) -> None:
        """Fill the ready replicas, the emptiest first."""
        for depth in range(WAITING):
            for replica in self.replicas:
                if replica.ready and len(replica.work) == depth and not any(w.deaths for w in replica.work.values()):
                    lease = self._next(source, alone=depth == 0)
                    if lease is not None:
                        replica.work[replica.actors[0].work.remote(lease.items)] = lease
        if not any(r.ready for r in self.replicas) and not self.again and (lease := self._draw(source)) is not None:
            self.again.append(lease)  # nothing is ready yet: keep one in hand, so that the loop goes on

    def _next(self, source: Iterator[Lease], alone: bool) -> Lease | None:
        """The next lease. One that has met a death gets a replica alone: whoever dies with it blames nobody else.

        (A result that was ready but not yet sent dies with its actor, so the oldest lease of several may be innocent.)
        """
        for lease in self.again:
            if alone or not lease.deaths:
                self.again.remove(lease)
                return lease
        return self._draw(source)

    def _draw(self, source: Iterator[Lease]) -> Lease | None:
        lease = next(source, None)
        self.has_more = lease is not None
        return lease

    def _collect(self) -> Iterator[Done]:
        import ray

        waiting = {ref: r for r in self.replicas for ref in (*r.starting, *r.following, *r.work)}
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
        if any(r.ready for r in self.replicas):
            self.last_alive = time.monotonic()
        elif time.monotonic() - self.last_alive > NOBODY_FOR_S:
            raise RayError(f"no worker could be placed for {NOBODY_FOR_S:g} s; the cluster is full or lost its nodes")
        for ref in done:
            replica = waiting[ref]
            if ref in replica.starting:
                self._welcome(replica, ref)
            elif ref in replica.work:
                yield from self._take(replica, ref)
            elif ref in replica.following:
                yield from self._recover(replica, RuntimeError("one of the processes that hold the model ended"))

    def _welcome(self, replica: Replica[Lease], ref: Any) -> None:
        import ray

        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            self.failed_starts += 1
            if self.failed_starts >= STARTS_BEFORE_GIVING_UP:
                raise RayError(
                    f"{self.failed_starts} workers in a row died while starting: {_reason(error)}"
                ) from error
            replica.restart()
        else:
            replica.starting.remove(ref)
            if replica.ready:
                self.failed_starts = 0

    def _take(self, replica: Replica[Lease], ref: Any) -> Iterator[Done]:
        import ray

        try:
            results = ray.get(ref)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ReplicaLost) as error:
            yield from self._recover(replica, error)
            return
        lease = replica.work.pop(ref)
        yield Done(lease.key, lease.offset, results, lease.items)

    def _recover(self, replica: Replica[Lease], error: Exception) -> Iterator[Done]:
        """A dead replica: what it finished is kept, the lease it worked on counts a death, the next one does not."""
        import ray

        held = list(replica.work.items())
        replica.work = {}
        blamed = False
        for ref, lease in held:
            try:
                finished = ray.get(ref, timeout=0)
            except (ray.exceptions.RayError, TimeoutError):
                if not blamed:
                    blamed, lease.deaths = True, lease.deaths + 1
                yield from self._lease_again(lease, error)
            else:
                yield Done(lease.key, lease.offset, finished, lease.items)
        replica.restart()

    def _lease_again(self, lease: Lease, error: Exception) -> Iterator[Done]:
        if lease.deaths < DEATHS_BEFORE_CUT:
            self.again.append(lease)
        elif len(lease.items) == 1:
            reason = f"killed {lease.deaths} workers: {' '.join(str(error).split())[:200]}"
            yield Done(lease.key, lease.offset, None, lease.items, reason)
        else:
            half = len(lease.items) // 2
            deaths = DEATHS_BEFORE_CUT - 1  # a half that does it is cut at its next death already
            self.again.append(Lease(lease.key, lease.items[:half], lease.offset, deaths))
            self.again.append(Lease(lease.key, lease.items[half:], lease.offset + half, deaths))

    def close(self) -> None:
        """End all actors and give back their places."""
        import ray

        if ray.is_initialized():
            for replica in self.replicas:
                replica.end()


def _reason(error: Exception) -> str:
    """The last words of what a worker said, on one line."""
    return " ".join(str(error).split())[-300:]
