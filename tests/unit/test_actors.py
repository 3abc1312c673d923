"""How the actor pool cuts leases that keep killing their worker (no Ray needed)."""

from __future__ import annotations

from collections import deque

from cluster.actors import DEATHS_BEFORE_CUT, Lease, _Pool
from cluster.replicas import Resources


def pool():
    bare = _Pool.__new__(_Pool)
    bare.again = deque()
    return bare


def kill(bare, lease):
    lease.deaths += 1
    return list(bare._lease_again(lease, RuntimeError("gone")))


def test_a_lease_survives_a_death_whole():
    bare, lease = pool(), Lease("a", [1, 2, 3])
    assert kill(bare, lease) == []
    assert list(bare.again) == [lease]


def test_a_lease_that_kills_again_and_again_is_cut_down_to_the_one_item():
    bare = pool()
    bare.again.append(Lease("a", list(range(13)), deaths=DEATHS_BEFORE_CUT - 1))
    done, finished = [], []
    while bare.again:
        lease = bare.again.popleft()
        if 5 in lease.items:
            done += kill(bare, lease)
        else:
            finished += [(lease.offset + k, item) for k, item in enumerate(lease.items)]
    assert [(d.offset, d.items, d.results) for d in done] == [(5, [5], None)]
    assert sorted(finished) == [(k, k) for k in range(13) if k != 5]


def test_a_bundle_asks_for_no_gpu_that_is_not_needed():
    assert Resources(2.0).bundle == {"CPU": 2.0}
    assert Resources(2.0, 1.0).bundle == {"CPU": 2.0, "GPU": 1.0}
