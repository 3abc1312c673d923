"""Small worlds for runs on a cluster: tests/multiprocess's tiny images and notes, and 96 records on a real SLURM."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from cluster.ray import PATIENT
from dermfm.records.table import SCHEMA, write_records

sys.path.append(str(Path(__file__).parent))  # folders of tests are no packages: for `import slurm_testbed`
_spec = importlib.util.spec_from_file_location(
    "tiny_world", Path(__file__).parents[1] / "multiprocess" / "conftest.py"
)  # and pytest looks for fixtures only above a test
assert _spec is not None
assert _spec.loader is not None
_world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_world)

# Also for clusters that a test starts by Ray's own means; and Ray's workers are no less than what else keeps a machine
# busy (their niceness is 15 by default, with which they hardly come to anything beside it).
for _name, _value in {**PATIENT, "RAY_worker_niceness": "0"}.items():
    os.environ.setdefault(_name, _value)
config_values, environment = _world.config_values, _world.environment
shard_folder, text_tower = _world.shard_folder, _world.text_tower


@pytest.fixture
def patient_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of `ray.cluster_utils` have minutes to come up: Ray's own 30 s are few for a busy machine."""
    from ray._private import services

    ask = services.get_node

    def ask_on(*arguments: Any) -> Any:
        end = time.monotonic() + float(PATIENT["RAY_raylet_start_wait_time_s"])
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:  # it is not there yet
                if time.monotonic() > end:
                    raise
            time.sleep(0.5)

    monkeypatch.setattr(services, "get_node", ask_on)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    """SLURM_CONF of a running testbed (also in the environment); skips with the reason where there cannot be one."""
    import slurm_testbed

    with slurm_testbed.testbed() as configuration:
        yield configuration


@pytest.fixture(scope="module")
def small_records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """records.parquet of 96 plain images in three colours and classes."""
    folder = tmp_path_factory.mktemp("small records")
    rows = []
    for k in range(96):
        colour = [(200, 150, 120), (90, 60, 40), (60, 60, 90)][k % 3]
        Image.new("RGB", (64, 64), tuple(c + k % 7 for c in colour)).save(folder / f"{k}.jpg")
        row = dict.fromkeys(SCHEMA.names)
        row |= {"record_id": f"{k:016x}", "dataset": "HAM10000", "source_id": str(k), "image": f"{k}.jpg"}
        row |= {"modality": "dermoscopic", "split": "train" if k < 64 else "test", "label": [2, 5, 6][k % 3]}
        row |= {"malignancy": "benign" if k % 3 == 0 else "malignant", "group_id": str(k), "site": "back", "age": 50.0}
        row |= {"class": ["nevus", "basal cell carcinoma", "melanoma"][k % 3]}
        row |= {"subclass": row["class"], "matched_class": row["class"]}
        rows.append(row)
    write_records(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "records.parquet")
    return folder / "records.parquet"


@pytest.fixture(scope="module")
def shards(slurm: Path, small_records: Path) -> Path:
    """Shards of the small records, packed by an array of two jobs whose folder has a name that a shell would mangle."""
    import slurm_testbed as bed

    out = small_records.parent / 'sh "ar$(ds)'
    job = bed.submit("shards", f"records={small_records}", f"out={out}", "cpus=1", "array=2", "shard_bytes=20000")
    assert bed.end(job)["state"] == "COMPLETED", bed.log_of(out)
    bed.wait_for((out / "manifest.json").is_file, lambda: bed.log_of(out))
    return out


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the small training makes on two ranks of this machine, without SLURM."""
    import slurm_testbed as bed

    run = tmp_path_factory.mktemp("runs") / "whole"
    line = [sys.executable, "-m", "launch.cli", "train", *bed.SMALL, f"run={run}", f"shards={shards}", "ranks=2"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=bed.WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def chain(small_records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of all six jobs on 96 images and their table."""
    folder = tmp_path_factory.mktemp("chain")
    rows = ["sample_id,dataset,modality,label,lesion_id,site,age"]
    rows += [f"{k},HAM10000,dermoscopic,{[2, 5, 6][k % 3]},{k},back,50" for k in range(96)]
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    settings: dict[str, Any] = {
        "extends": str(Path("configs/base.yaml").absolute()),
        "data": None,
        "records": {
            "layout": "generic", "duplicate_distance": -1, "images": str(small_records.parent),
            "table": str(folder / "table.csv"),
        },
        "notes": {"strategies": ["template"]},
        "train": {
            "model": {"image": {"size": 64}}, "contrastive_batch": 16, "micro_batch": 8, "epochs": 2,
            "strategies": {"template": 1}, "threads": 1, "device": "cpu",
        },
        "evaluate": {"device": "cpu"},
    }  # fmt: skip
    (folder / "chain.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder / "chain.yaml"
