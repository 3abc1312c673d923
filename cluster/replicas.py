"""One replica of a worker on Ray: a placement group with one bundle a shard, and the actors in it.

Three shapes: one actor; several actors that hold one model together (one a bundle, ranks 0 … n − 1); or one actor
whose library starts its own processes in the other bundles (`own_shards`, as vLLM does).
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from cluster.ray import RayError

L = TypeVar("L")


class ReplicaLost(Exception):  # noqa: N818  it says what happened
    """Raised by a worker whose replica cannot go on: it is replaced, as if its process had died."""


@dataclass(frozen=True)
class Resources:
    """What one replica needs: CPUs and GPUs of each bundle, threads that a process may use, bundles (shards)."""

    cpus: float = 1.0
    gpus: float = 0.0
    threads: int = 1
    shards: int = 1
    own_shards: bool = False  # the worker's library fills the bundles by itself
    memory: float = 0.0  # bytes of main memory of each bundle

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray spells it."""
        more = {"GPU": self.gpus, "memory": float(int(self.memory))}
        return {"CPU": self.cpus, **{name: amount for name, amount in more.items() if amount}}

    @property
    def num_actors(self) -> int:
        """Actors of ours in one replica."""
        return 1 if self.own_shards else self.shards


def room_for(resources: Resources, at_least: int = 1) -> int:
    """How many replicas the whole cluster can hold; RayError where it is fewer than `at_least`, with what it has.

    Where a node can hold all shards of a replica, replicas stay on one node each.
    """
    bundles = _bundles_by_node(resources)
    room = _room(bundles, resources.shards)
    if room < at_least:
        need = _told(resources.bundle)
        if resources.shards > 1:
            need = f"{resources.shards} bundles of {need}"
        raise RayError(f"a replica needs {need}; {_what_is_there(resources, sum(bundles))}")
    return room


def accelerators() -> list[str]:
    """Names of the accelerators that the nodes have, as Ray finds them (A100, H100, …)."""
    prefix = "accelerator_type:"
    return sorted({name.removeprefix(prefix) for n in _nodes() for name in n if name.startswith(prefix)})


def _nodes() -> list[dict[str, float]]:
    import ray

    return [n["Resources"] for n in ray.nodes() if n["Alive"]]


def _fits(node: dict[str, float], resources: Resources) -> int:
    return int(min(node.get(name, 0.0) // need for name, need in resources.bundle.items() if need))


def _bundles_by_node(resources: Resources) -> list[int]:
    return [_fits(node, resources) for node in _nodes()]


def _room(bundles: Sequence[int], shards: int) -> int:
    """Replicas of `shards` bundles where the nodes hold so many bundles each."""
    whole = sum(count // shards for count in bundles)
    return whole or sum(bundles) // shards


def _what_is_there(resources: Resources, bundles: int) -> str:
    nodes = sorted({_told({"GPU": 0.0, **node}) for node in _nodes()})
    if bundles == 0:
        return f"no node has them ({'; '.join(nodes) or 'no nodes'})"
    return f"the cluster holds {bundles} of them ({'; '.join(nodes)})"


def _told(amounts: dict[str, float]) -> str:
    told = [f"{amounts[name]:g} {name}s" for name in ("CPU", "GPU") if name in amounts]
    return " and ".join([*told, f"{amounts['memory'] / 1e9:.1f} GB"] if amounts.get("memory") else told)


@dataclass(eq=False)
class Replica(Generic[L]):
    """A placement group and its actors; `work` is what it holds (reference of the answer → lease)."""

    group: Any
    worker: Any
    arguments: tuple[Any, ...]
    resources: Resources
    actors: list[Any] = field(default_factory=list)
    starting: list[Any] = field(default_factory=list)  # references that resolve once a worker is built
    following: list[Any] = field(default_factory=list)  # of ranks that end only by mishap
    work: dict[Any, L] = field(default_factory=dict)

    @classmethod
    def start(cls, worker: Any, arguments: tuple[Any, ...], resources: Resources) -> Replica[L]:
        """Ask for the places and start the actors there, without waiting for either."""
        from ray.util.placement_group import placement_group

        together = any(count >= resources.shards for count in _bundles_by_node(resources))
        strategy = "STRICT_PACK" if together else "PACK"
        group = placement_group([resources.bundle] * resources.shards, strategy=strategy)
        replica = cls(group, worker, arguments, resources)
        replica._fill()
        return replica

    @property
    def ready(self) -> bool:
        """Whether all of its workers are built."""
        return not self.starting

    def restart(self) -> None:
        """New actors in the same placement group (Ray moves what was on a lost node)."""
        self._kill()
        self._fill()

    def end(self) -> None:
        """End the actors and give back their places."""
        from ray.util.placement_group import remove_placement_group

        self._kill()
        remove_placement_group(self.group)

    def _fill(self) -> None:
        world = self.resources.num_actors
        self.actors = [self._actor(rank) for rank in range(world)]
        meeting = self.actors[0].meeting.remote() if world > 1 else None
        self.starting = [
            actor.build.remote(self.worker, self.arguments, rank, world, meeting)
            for rank, actor in enumerate(self.actors)
        ]
        self.following = [actor.follow.remote() for actor in self.actors[1:]]

    def _actor(self, rank: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        own = self.resources.own_shards and self.resources.shards > 1
        place = PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=rank, placement_group_capture_child_tasks=own
        )
        options: Any = ray.remote(_Actor).options(
            num_cpus=self.resources.cpus,
            num_gpus=0 if own else self.resources.gpus,
            max_restarts=0,
            scheduling_strategy=place,
            runtime_env={"env_vars": _environment(self.resources.threads)},
        )
        return options.remote()

    def _kill(self) -> None:
        import ray

        for actor in self.actors:
            ray.kill(actor, no_restart=True)


class _Actor:
    """Holds one worker; built and called by the pool."""

    def meeting(self) -> tuple[str, int]:
        """This node's address and a free port on it, where the other ranks come."""
        import ray

        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind((address, 0))
            return address, free.getsockname()[1]

    def build(
        self, worker: type, arguments: tuple[Any, ...], rank: int, world: int, meeting: tuple[str, int] | None
    ) -> None:
        """Make the worker."""
        seat = {} if meeting is None else {"seat": (rank, world, *meeting)}
        self.worker = worker(*arguments, **seat)

    def follow(self) -> None:
        """Do what rank 0 tells."""
        self.worker.follow()

    def work(self, items: Sequence[Any]) -> list[Any]:
        """One result an item."""
        results = list(self.worker.work(items))
        assert len(results) == len(items), "a worker must give one result an item"
        return results


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**{name: str(threads) for name in names}, "TOKENIZERS_PARALLELISM": "false"}
