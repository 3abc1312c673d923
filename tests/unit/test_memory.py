"""The arithmetic of memory, checkpoints and communication, against the numbers of the ZeRO paper and by hand."""

from __future__ import annotations

import pytest

from dermfm import memory
from dermfm.memory import Sharding

BILLION = 1_000_000_000


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)], ids=lambda v: str(v))
def test_model_states_are_those_of_figure_1_of_the_zero_paper(stage, gigabytes):
    """7.5 billion parameters, 64 GPUs, mixed precision, K = 12 (arXiv 1910.02054, figure 1)."""
    found = memory.states(int(7.5 * BILLION), 0, Sharding(stage, "fp16", 64))
    assert found.device / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_fp32_counts_parameters_gradients_and_moments_and_from_stage_1_a_second_copy():
    bytes_each = [memory.states(BILLION, 0, Sharding(stage, "fp32", 1)).device / BILLION for stage in range(4)]
    assert bytes_each == [16, 20, 20, 20]


def test_frozen_parameters_cost_their_precision_and_are_sharded_at_stage_3_only():
    by_stage = [memory.states(0, 1000, Sharding(stage, "bf16", 4)) for stage in range(4)]
    assert [found.device for found in by_stage] == [2000, 2000, 2000, 500]
    assert all(found.frozen == found.device for found in by_stage)


def test_an_offloaded_optimizer_leaves_the_device_and_fills_the_host():
    kept, moved = (memory.states(1000, 0, Sharding(2, "bf16", 4, offload_optimizer=o)) for o in (False, True))
    assert kept.host == 0
    assert moved.optimizer == 0
    assert moved.device == 2000
    assert moved.host >= kept.optimizer
    everything = memory.states(1000, 500, Sharding(3, "bf16", 4, offload_optimizer=True, offload_parameters=True))
    assert everything.device == 0


@pytest.mark.parametrize(
    ("learning", "elements"),
    [
        (1_000_000, 1_000_000),
        (1_000_001, 1_000_002),
        (20_000_000, 5_000_000),
        (200_000_000, 20_000_000),
        (10 * BILLION, 200_000_000),
    ],
)
def test_a_bucket_follows_the_size_of_the_model(learning, elements):
    assert memory.bucket_elements(learning) == elements


def test_stage_2_sends_gradients_for_every_micro_batch_and_stage_3_parameters_for_every_pass():
    def sent(stage: int, num_micro: int) -> dict[str, float]:
        how = Sharding(stage, "bf16", 4)
        return memory.communication(1000, 1000, how, num_micro, batch=8, embed_dim=2, row_bytes=80)

    full = 0.75 * 2000  # a ring sends (N − 1) / N of the data
    assert [sent(stage, 1)["gradients"] for stage in range(4)] == [2 * full, 2 * full, 2 * full, full]
    assert [sent(stage, 5)["gradients"] for stage in range(4)] == [2 * full, 2 * full, 10 * full, 5 * full]
    assert [sent(stage, 1)["parameters"] for stage in range(4)] == [0, full, full, 2 * full]
    # five micro-batches forward and backward, and before that four of them and one for their features
    assert sent(3, 5)["parameters"] == (5 + 5 + 2) * full
    assert sent(1, 1)["notes"] == 0.75 * 8 * 80
    assert sum(memory.communication(9, 9, Sharding(2, "bf16", 1), 1, 8, 2, 80).values()) == 0


def test_all_ranks_together_write_the_same_checkpoint_whatever_their_number():
    sizes = [memory.checkpoint_size(1000, 100, Sharding(2, "bf16", world)) for world in (1, 8)]
    assert [size.total for size in sizes] == [2 * 1100 + 12 * 1000] * 2
    assert sizes[1].largest_rank == 2 * 1100 + 12 * 1000 / 8
