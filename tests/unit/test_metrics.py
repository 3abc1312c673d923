"""metrics.jsonl and TensorBoard hold the same rows; a resumed run cuts both back to its checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from dermfm import speed as speed_module
from dermfm.flops import peak_tflops
from dermfm.metrics import MetricsLog, keep_rows, line, read_rows
from dermfm.speed import Forwards, Speed


def board_of(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def write_steps(run: Path, start: int, steps: range, offset: float = 0.0) -> None:
    log = MetricsLog(run, start, active=True)
    for step in steps:
        log.write(step, {"loss": step + offset, "lr": 0.1})
    log.close()


def test_rows_are_in_both_outputs(tmp_path):
    write_steps(tmp_path, 0, range(1, 4))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows == [{"step": s, "loss": float(s), "lr": 0.1} for s in (1, 2, 3)]
    assert board_of(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_resumed_run_has_no_step_twice(tmp_path):
    write_steps(tmp_path, 0, range(1, 8))
    write_steps(tmp_path, 4, range(5, 7), offset=0.5)
    assert [(r["step"], r["loss"]) for r in read_rows(tmp_path / "metrics.jsonl")] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.5), (6, 6.5),
    ]  # fmt: skip
    assert board_of(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.5), (6, 6.5)]


def test_a_run_that_begins_anew_begins_with_empty_outputs(tmp_path):
    write_steps(tmp_path, 0, range(1, 3))
    write_steps(tmp_path, 0, range(1, 2), offset=0.5)
    assert [r["loss"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1.5]


def test_what_is_not_finite_is_null_so_that_every_line_is_json(tmp_path):
    log = MetricsLog(tmp_path, 0, active=True)
    log.write(1, {"loss": math.nan, "norm": math.inf, "lr": 1.0})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "norm": None, "lr": 1.0}


def test_other_ranks_write_nothing(tmp_path):
    log = MetricsLog(tmp_path, 0, active=False)
    log.write(1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_short_by_a_kill_is_left_out_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1, "loss": 1.0}]
    assert "a broken line is left out" in caplog.text
    keep_rows(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_without_rows_has_none(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []
    keep_rows(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_speed_is_measured_over_the_interval(monkeypatch):
    hand = [50.0]
    monkeypatch.setattr(speed_module.time, "monotonic", lambda: hand[0])
    speed = Speed(flops_per_sample=2e9, peak_tflops=0.5)
    for seconds in (0.25, 0.25, 0.25, 1.25):
        hand[0] += seconds
        speed.add(32, waited_s=0.1)
    values = speed.values()
    assert values["samples_per_s"] == values["samples_per_s_per_gpu"] == pytest.approx(64)
    assert values["step_s"] == pytest.approx(0.5)
    assert values["step_s_p50"] == pytest.approx(0.25)
    assert values["step_s_p95"] == pytest.approx(np.quantile([0.25, 0.25, 0.25, 1.25], 0.95))
    assert values["data_wait"] == pytest.approx(0.2)
    assert values["mfu"] == pytest.approx(64 * 2e9 / 0.5e12)
    assert 0.01 < values["memory_gb"] < 100
    assert values["slowest_rank"] == values["slowest_lag_s"] == 0
    speed.reset()
    hand[0] += 1
    assert speed.values()["samples_per_s"] == 0


def test_only_the_forward_passes_of_a_logged_step_are_timed(monkeypatch):
    hand = [0.0]
    monkeypatch.setattr(speed_module.time, "monotonic", lambda: hand[0])

    class Slow(nn.Linear):
        def forward(self, x):
            hand[0] += 0.5
            return super().forward(x)

    model = Slow(2, 2)
    forwards = Forwards(model)
    speed = Speed(forwards=forwards)
    model(torch.zeros(1, 2))
    speed.next_is_logged(True)
    model(torch.zeros(1, 2))
    model(torch.zeros(1, 2))
    assert forwards.seconds() == pytest.approx(1.0)
    assert forwards.seconds() == 0


def test_mfu_is_left_out_where_no_peak_is_known():
    assert "mfu" not in Speed().values()
    assert peak_tflops("cpu", "fp32") == 0
    assert peak_tflops("cpu", "fp32", given=2.5) == 2.5


def test_hyperparameters_stand_beside_the_final_metrics(tmp_path):
    log = MetricsLog(tmp_path, 0, active=True)
    log.summary({"seed": 3, "model": {"size": [2, 4], "name": None}}, {"loss": 1.5, "norm": math.nan})
    log.picture(2, "pairs/0", np.zeros((4, 8, 3), np.uint8), "a note")
    log.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [e.value for e in events.Scalars("final/loss")] == [1.5]
    assert "final/norm" not in events.Tags()["scalars"]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.size" in content
    assert b"[2, 4]" in content
    assert events.Images("pairs/0")[0].width == 8


def test_the_terminal_line_names_losses_speed_and_time_left():
    values = {
        "loss": 1.25, "loss/contrastive": 1.0, "loss/matching": 0.5, "lr": 1e-3, "grad_norm": 2.0,
        "samples_per_s": 64.0, "step_s": 0.5, "data_wait": 0.2, "memory_gb": 1.5,
    }  # fmt: skip
    assert line(20, 140, values) == (
        "step 20/140 loss 1.2500 (contrastive 1.000 matching 0.500) lr 1.00e-03 norm 2.00 64.0 samples/s "
        "wait 20.0% 1.5 GB ETA 1:00"
    )
    assert "64.0 samples/s MFU 41.0% wait" in line(20, 140, values | {"mfu": 0.41})
    assert "1.5+70.2 GB" in line(20, 140, values | {"device_memory_gb": 70.2})
