"""DeepSpeed as this project starts it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dermfm import zero
from dermfm.config import InputError


def test_deepspeed_builds_with_the_ninja_of_this_environment_whatever_stands_first_on_the_path(monkeypatch):
    own = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"/usr/bin:{own}")
    zero.ready("cpu")
    assert shutil.which("ninja") == str(own / "ninja")


def test_what_deepspeed_builds_stays_in_this_environment_unless_another_folder_is_named(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    zero.ready("cpu")
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).parent == Path(sys.prefix)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    zero.ready("cpu")
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/elsewhere"


def test_the_lock_of_a_killed_build_is_taken_away_and_that_of_a_living_one_stays(tmp_path):
    for name, age, stays in (("dead", zero.STALE_S + 60, False), ("alive", 60, True)):
        build = tmp_path / name
        build.mkdir()
        for file in ("build.ninja", "lock"):
            (build / file).touch()
            os.utime(build / file, (time.time() - age,) * 2)
        zero._clear_stale_lock(build)
        assert (build / "lock").exists() == stays
    zero._clear_stale_lock(tmp_path / "nothing was built here")


def settings_of(device: str, **zero_config: Any) -> dict[str, Any]:
    config = zero.ZeroConfig(**zero_config)
    return zero.deepspeed_json(
        config, micro_batch=1, num_micro=1, world=1, optimizer={}, device=device, num_learning=10, num_parameters=10
    )


def test_adamw_is_fused_where_its_states_lie_in_host_memory_and_over_all_tensors_at_once_on_a_gpu():
    fused = {
        where: settings_of(where[0], stage=1, offload_optimizer=where[1])["optimizer"]["params"]["fused"]
        for where in (("cpu", False), ("cuda", False), ("cuda:1", True))
    }
    assert fused == {("cpu", False): True, ("cuda", False): False, ("cuda:1", True): True}


@pytest.mark.parametrize("name", zero.OWNED)
def test_extra_cannot_set_what_a_key_of_its_own_decides(name):
    value: Any = 1
    for part in reversed(name.split(".")):
        value = {part: value}
    with pytest.raises(ValueError, match=rf"zero\.extra\.{name}: cannot be set here; it follows from "):
        zero.ZeroConfig(extra=value)


def test_a_section_of_extra_that_is_no_section_is_refused():
    with pytest.raises(ValueError, match=r"zero\.extra\.optimizer: 5 is not valid"):
        zero.ZeroConfig(extra={"optimizer": 5})


@pytest.mark.parametrize("name", zero.UNRESUMABLE)
def test_a_layout_that_another_number_of_ranks_cannot_read_is_refused_at_the_start(name):
    zero.ZeroConfig(extra={"zero_optimization": {name: False}})
    with pytest.raises(ValueError, match=f"{name}: a run with it could not go on with another number of ranks"):
        zero.ZeroConfig(extra={"zero_optimization": {name: True}})


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_nvme_is_refused_below_stage_3_where_deepspeed_would_take_host_memory_without_a_word(name, stage):
    extra = {"zero_optimization": {name: {"device": "nvme", "nvme_path": "/nvme"}}}
    assert zero.ZeroConfig(stage=3, extra=extra).extra == extra
    with pytest.raises(ValueError, match=rf"{name}: nvme needs zero\.stage=3, it is {stage}"):
        zero.ZeroConfig(stage=stage, extra=extra)


@pytest.mark.parametrize(
    "wrong", [{"zero_optimization": {"nonsense": 1}}, {"zero_optimization": {"mics_shard_size": 2}}]
)
def test_what_deepspeed_refuses_is_bad_input_in_one_line(alone, wrong):
    model = nn.Linear(2, 2)
    groups = [{"params": list(model.parameters()), "lr": 0.1, "name": "heads"}]
    with pytest.raises(InputError, match=r"zero: DeepSpeed refuses this configuration: [^\n]+$"):
        zero.initialize(model, groups, settings_of("cpu", stage=3, extra=wrong), "cpu")


def test_what_stands_in_extra_overrides_what_is_chosen_here():
    extra = {"zero_optimization": {"reduce_scatter": True}, "optimizer": {"params": {"fused": False}}}
    chosen, wanted = settings_of("cpu", stage=1), settings_of("cpu", stage=1, extra=extra)
    assert not chosen["zero_optimization"]["reduce_scatter"]
    assert chosen["prescale_gradients"]
    assert wanted["zero_optimization"]["reduce_scatter"]
    assert not wanted["prescale_gradients"]  # DeepSpeed refuses both together at stage 2
    assert wanted["optimizer"]["params"] == {"torch_adam": True, "fused": False}
