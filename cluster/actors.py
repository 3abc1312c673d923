"""A pool of Ray actors that work through leases; dead actors are replaced and what they held is leased again.

Each replica lives in a placement group of its own. A replica holds at most one lease that it works on and one that
waits, so memory stays flat however many leases there are. A dead replica costs the leases that it held, not more: they
go to the front of the queue. A lease that kills its replica again and again is cut in halves until the one item that
does it is alone; that item is given back as poisoned.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cluster.ray import RayError

K = TypeVar("K")
WAITING = 2  # leases a replica: one in work, one ready behind it
DEATHS_BEFORE_CUT = 3
STARTS_BEFORE_GIVING_UP = 3
POLL_S = 1.0
NOBODY_FOR_S = 600.0  # without any live replica for so long, the pool gives up


@dataclass(frozen=True)
class Resources:
    """What one replica needs: CPUs and GPUs of one bundle, and threads that its process may use."""

    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray spells it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


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


@dataclass(eq=False)
class _Replica:
    group: Any
    actor: Any  # handle of an _Actor
    started: Any  # reference that resolves once the worker is built
    ready: bool = False
    work: dict[Any, Lease] = field(default_factory=dict)


def room_for(resources: Resources) -> int:
    """How many replicas the cluster can hold now, node by node; RayError where not even one fits on any node."""
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    room = sum(int(min(n.get(name, 0.0) // need for name, need in resources.bundle.items() if need)) for n in nodes)
    if room == 0:
        largest = max((f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes), default="no nodes")
        raise RayError(
            f"a replica needs {resources.cpus:g} CPUs and {resources.gpus:g} GPUs; no node has them ({largest})"
        )
    return room


def work_through(
    leases: Iterable[tuple[K, Sequence[Any]]],
    worker: type,
    arguments: tuple[Any, ...] = (),
    *,
    replicas: int,
    resources: Resources | None = None,
) -> Iterator[Done]:
    """Give every lease (key, items) to one of `replicas` actors and yield what comes back, in the order it comes.

    `worker(*arguments)` is built once in each actor; `worker.work(items) -> list of results, one an item`. Each item's
    result is yielded exactly once. The actors end when the iterator is closed or exhausted. Raises RayError when
    replicas cannot be started, and whatever `work` itself raises.
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
        self.remote = ray.remote(_Actor)
        self.worker = ray.put(worker)
        self.replicas: list[_Replica] = []
        self.again: deque[Lease] = deque()
        self.failed_starts = 0
        self.last_alive = time.monotonic()

    def run(self, leases: Iterator[tuple[Any, Sequence[Any]]], replicas: int) -> Iterator[Done]:
        source: Iterator[Lease] = (Lease(key, list(items)) for key, items in leases)
        first = list(itertools.islice(source, replicas * WAITING))
        source = itertools.chain(first, source)
        self.replicas = [self._start() for _ in range(min(replicas, len(first)))]
        while True:
            self._hand_out(source)
            if not any(r.work for r in self.replicas) and not self.again:
                return
            yield from self._collect()

    def _hand_out(self, source: Iterator[Lease]) -> None:
        """Fill the ready replicas, the emptiest first."""
        for depth in range(WAITING):
            for replica in self.replicas:
                if replica.ready and len(replica.work) == depth and not any(w.deaths for w in replica.work.values()):
                    lease = self._next(source, alone=depth == 0)
                    if lease is not None:
                        replica.work[replica.actor.work.remote(lease.items)] = lease
        if not any(r.ready for r in self.replicas) and not self.again and (lease := next(source, None)) is not None:
            self.again.append(lease)  # nothing is ready yet: keep one in hand, so that the loop goes on

    def _next(self, source: Iterator[Lease], alone: bool) -> Lease | None:
        """The next lease. One that has met a death gets a replica alone: whoever dies with it blames nobody else.

        (A result that was ready but not yet sent dies with its actor, so the oldest lease of several may be innocent.)
        """
        for lease in self.again:
            if alone or not lease.deaths:
                self.again.remove(lease)
                return lease
        return next(source, None)

    def _collect(self) -> Iterator[Done]:
        import ray

        waiting = {r.started: r for r in self.replicas if not r.ready}
        waiting |= {ref: r for r in self.replicas for ref in r.work}
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
        if any(r.ready for r in self.replicas):
            self.last_alive = time.monotonic()
        elif time.monotonic() - self.last_alive > NOBODY_FOR_S:
            raise RayError(f"no worker could be placed for {NOBODY_FOR_S:g} s; the cluster is full or lost its nodes")
        for ref in done:
            replica = waiting[ref]
            if ref == replica.started and not replica.ready:
                self._welcome(replica)
            elif ref in replica.work:
                yield from self._take(replica, ref)

    def _welcome(self, replica: _Replica) -> None:
        import ray

        try:
            ray.get(replica.started)
            replica.ready, self.failed_starts = True, 0
        except ray.exceptions.RayActorError as error:
            self.failed_starts += 1
            if self.failed_starts >= STARTS_BEFORE_GIVING_UP:
                reason = " ".join(str(error).split())[-300:]
                raise RayError(f"{self.failed_starts} workers in a row died while starting: {reason}") from error
            self._restart(replica)

    def _take(self, replica: _Replica, ref: Any) -> Iterator[Done]:
        import ray

        try:
            results = ray.get(ref)
        except ray.exceptions.RayActorError as error:
            yield from self._recover(replica, error)
            return
        lease = replica.work.pop(ref)
        yield Done(lease.key, lease.offset, results, lease.items)

    def _recover(self, replica: _Replica, error: Exception) -> Iterator[Done]:
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
        self._restart(replica)

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

    def _start(self, group: Any = None) -> _Replica:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = group or placement_group([self.resources.bundle], strategy="PACK")
        options = self.remote.options(
            num_cpus=self.resources.cpus,
            num_gpus=self.resources.gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            runtime_env={"env_vars": _environment(self.resources.threads)},
        )
        actor: Any = options.remote(self.worker, self.arguments)
        return _Replica(group, actor, actor.ready.remote())

    def _restart(self, replica: _Replica) -> None:
        """A new actor in the dead one's placement group (Ray moves the group if its node is gone)."""
        fresh = self._start(replica.group)
        replica.actor, replica.started, replica.ready = fresh.actor, fresh.started, False

    def close(self) -> None:
        """End all actors and give back their places."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():
            return
        for replica in self.replicas:
            ray.kill(replica.actor, no_restart=True)
            remove_placement_group(replica.group)


class _Actor:
    """Holds one worker; built and called by the pool."""

    def __init__(self, worker: type, arguments: tuple[Any, ...]) -> None:
        self.worker = worker(*arguments)

    def ready(self) -> bool:
        """Answers once the worker is built."""
        return True

    def work(self, items: Sequence[Any]) -> list[Any]:
        """One result an item."""
        results = list(self.worker.work(items))
        assert len(results) == len(items), "a worker must give one result an item"
        return results


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**{name: str(threads) for name in names}, "TOKENIZERS_PARALLELISM": "false"}
