"""`dermfm plan`: from counted and traced sizes to a verdict; what cannot be planned is refused in one line."""

from __future__ import annotations

import dataclasses

import pytest

from dermfm import scale, scale_table
from dermfm.config import InputError, load
from dermfm.scale import GB, ScaleConfig, Sizes

SIZES = Sizes(200_000_000, 50_000_000, {"image": 150_000_000, "text": 100_000_000}, 28e9, 30e9, 1e9)


def config(**changes: object) -> ScaleConfig:
    values = {"num_samples": 100_000, "nodes": 2, "gpus": 8, "contrastive_batch": 4096, "micro_batch": 128}
    found = ScaleConfig(**{**values, **changes})  # type: ignore[arg-type]
    found.zero = dataclasses.replace(found.zero, stage=2, precision="bf16")
    return found


def needed(found: ScaleConfig) -> scale.Need:
    how = scale.sharding(found, found.world)
    return scale.need(found, SIZES, how, scale.steps_of(found), found.reserve_gb * GB)


def test_the_peak_is_the_sum_of_what_is_alive_together():
    found = needed(config())
    states = 200e6 * (2 + 2 / 16 + 12 / 16) + 50e6 * 2
    assert found.states.device == pytest.approx(states)
    batch = 256 * (3 * 224**2 + (96 + 6) * 8)
    # Two micro-batches: their activations are gone while the contrast is computed.
    assert found.peak == pytest.approx(states + batch + 30e9 + 2 * 20e6 * 2 + 2e9)
    one = needed(config(micro_batch=256))
    assert one.peak == pytest.approx(found.peak + 1e9)


def test_a_run_that_fits_says_how_much_is_free():
    found = config(gpu_memory_gb=80)
    assert scale_table.verdict(found, SIZES, needed(found), scale.steps_of(found)) == [
        f"fits: {needed(found).peak / GB:.1f} of 80 GB, 59% free"
    ]


def test_a_run_that_does_not_fit_is_told_the_largest_micro_batch_that_does():
    found = config(gpu_memory_gb=24)
    first, *remedies = scale_table.verdict(found, SIZES, needed(found), scale.steps_of(found))
    assert first.startswith("does not fit: 3")
    assert "  micro_batch=64 (the contrastive batch stays: grad cache)" in remedies
    assert any("activation_checkpointing=[all]" in line for line in remedies)
    smaller = dataclasses.replace(SIZES, passing=SIZES.passing / 2)
    how, p = scale.sharding(found, found.world), scale.steps_of(dataclasses.replace(found, micro_batch=64))
    assert scale.need(found, smaller, how, p, 2 * GB).peak < 24 * GB


def test_a_model_whose_states_do_not_fit_is_told_the_stage_that_does():
    large = dataclasses.replace(SIZES, learning=8_000_000_000, passing=1e9)
    found = config(gpu_memory_gb=24)
    peak = scale.need(found, large, scale.sharding(found, found.world), scale.steps_of(found), 2 * GB)
    lines = scale_table.verdict(found, large, peak, scale.steps_of(found))
    assert any(line.startswith("  zero.stage=3 (") for line in lines)


def test_what_is_offloaded_must_fit_the_node():
    found = config()
    found.zero = dataclasses.replace(found.zero, offload_optimizer=True)

    def verdict(host_memory_gb: float) -> str:
        planned = dataclasses.replace(found, host_memory_gb=host_memory_gb)
        return scale_table.verdict(planned, SIZES, needed(planned), scale.steps_of(planned))[0]

    assert verdict(3) == "does not fit: 5 GB offloaded on a node of 3 GB"
    assert verdict(10).startswith("fits: ")


def test_hours_disk_and_communication_follow_from_the_samples():
    found = config(samples_per_s=1000, disk_gb_s=2, network_gb_s=10, epochs=1.024, checkpoint_every=10_000)
    rows = {name: value for name, value, _ in scale_table.run_rows(found, SIZES, scale.steps_of(found))}
    assert rows["steps"] == "25"
    assert rows["time"] == f"{25 * 4096 / 1000 / 3600:.2f} h"
    assert rows["checkpoint"] == "2.90 GB"  # 250 M in bf16, 200 M × 12
    assert rows["checkpoint write"] == "1.4 s"
    assert rows["sent: gradients"] == f"{2 * 2 * 200e6 * 2 * 15 / 16 / 1e9:.3f} GB"  # all-reduced for two micro-batches
    assert "sending" in rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "shards: give shards=<folder> or num_samples=<number>, one of them"),
        (["shards=a", "num_samples=5"], "shards: give shards=<folder> or num_samples=<number>, one of them"),
        (["num_samples=5", "nodes=0"], "nodes: 0 is not valid; it must be between 1 and 100000"),
        (["num_samples=5", "gpu_memory_gb=-1"], "gpu_memory_gb: -1"),
    ],
)
def test_machines_that_there_are_not_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        load(ScaleConfig, None, changes)


def test_a_world_that_does_not_divide_the_batch_is_told_its_legal_neighbours():
    with pytest.raises(InputError, match="contrastive_batch: 4096 is not divisible by 24 ranks; 4080 and 4104 are"):
        scale.steps_of(config(nodes=3))


def test_a_micro_batch_that_does_not_divide_a_ranks_part_is_told_its_legal_neighbours():
    with pytest.raises(InputError, match="micro_batch: 100 does not divide the 256 samples of a rank; 64 and 128 do"):
        scale.steps_of(config(micro_batch=100))
