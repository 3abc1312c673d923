"""Writing notes: our transformers engine against a plain loop of `generate`, and what Ray costs a note.

    python benchmarks/notes.py [--quick] [--model=smollm2] [--only=generation|ray]

Both sides of the first figure have the same model, prompts (few-shot, as `narrative` sends them), greedy decoding,
token limit, dtype and threads; they alternate, the figure is the median of notes/s. The loop calls `model.generate` one
record at a time, as published notebooks do. The second figure writes `template` notes on Ray actors of this machine
and divides the wall time (without Ray's start) by their number; memory is the growth of the driver between an eighth
of them and all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's own folder would shadow `shards`

import psutil
import pyarrow as pa
import torch

from benchmarks.shared.figures import figure, show
from cluster.ray import ray_session
from dermfm.notes.engines.protocol import EngineConfig, Request, prepare_engine
from dermfm.notes.engines.transformers import build
from dermfm.notes.plan import NotesConfig
from dermfm.notes.synthesize import make_item, plan_notes, synthesize
from dermfm.records.table import SCHEMA, write_records

SITES = ["back", "face", "lower extremity", "scalp", "chest", "hand", "abdomen"]
CLASSES = [
    (2, "benign", "nevus, nos, compound", "melanocytic / benign nevus"),
    (5, "malignant", "basal cell carcinoma", "basal cell cancer"),
    (6, "malignant", "melanoma in situ", "melanoma"),
    (4, "pre-cancerous", "solar or actinic keratosis", "actinic keratosis"),
]


def write_table(path: Path, count: int) -> str:
    """records.parquet of `count` made-up records of four classes."""
    rows = []
    for k in range(count):
        label, malignancy, detail, matched = CLASSES[k % len(CLASSES)]
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
        row |= {"record_id": f"{k:016x}", "dataset": "HAM10000", "source_id": str(k), "image": "x.jpg"}
        row |= {"modality": "dermoscopic", "split": "train", "label": label, "malignancy": malignancy}
        row |= {"class": detail, "subclass": detail, "matched_class": matched, "group_id": str(k)}
        row |= {"age": float(20 + k % 65), "sex": ["male", "female"][k % 2], "site": SITES[k % len(SITES)]}
        rows.append(row)
    write_records(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return str(path)


def requests_of(folder: Path, count: int, engine: EngineConfig) -> list[Request]:
    """What `narrative` asks for so many records."""
    table = write_table(folder / "asked.parquet", count)
    config = NotesConfig(records=table, out=str(folder / "asked"), strategies=["narrative"], engine=engine)
    plan, records = plan_notes(config)
    rows = records.to_pylist()
    return [make_item(note, rows[note.row], config).request for note in plan.notes.values()]


def plain_loop(engine: Any, requests: list[Request]) -> int:
    """One `generate` a record; returns the new tokens."""
    tokens = 0
    for request in requests:
        chat = [{"role": role, "content": content} for role, content in request.messages]
        text = engine.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = engine.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            found = engine.model.generate(**inputs, max_new_tokens=engine.config.max_new_tokens, do_sample=False)
        tokens += found.shape[1] - inputs["input_ids"].shape[1]
    return tokens


def generation(folder: Path, model: str, quick: bool) -> dict[str, Any]:
    """Notes a second of both sides."""
    config = EngineConfig(model=model, batch_size=128)
    prepare_engine(config)
    engine = build(config)
    ours_count, loop_count, rounds = (32, 2, 1) if quick else (128, 6, 2)
    requests = requests_of(folder, ours_count, config)
    engine.generate(requests[:2])  # the first call allocates
    ours, loop = [], []
    for k in range(rounds):
        chosen = requests[k * loop_count : (k + 1) * loop_count]
        began = time.perf_counter()
        plain_loop(engine, chosen)
        loop.append(loop_count / (time.perf_counter() - began))
        engine._prefixes.clear()  # each round computes its shared beginnings again
        began = time.perf_counter()
        engine.generate(requests)
        ours.append(ours_count / (time.perf_counter() - began))
    return figure("notes a second, SmolLM2", statistics.median(ours), statistics.median(loop), "notes/s", 10.0)


def ray_cost(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Milliseconds a template note through Ray, and the driver's memory."""
    counts = (2_000, 16_000) if quick else (12_500, 100_000)
    seconds, memory = {}, {}
    with ray_session(num_cpus=max(2, os.cpu_count() or 1)):
        for count in counts:
            path = write_table(folder / f"{count}.parquet", count)
            config = NotesConfig(records=path, out=str(folder / str(count)), strategies=["template"], ray="always")
            plan, table = plan_notes(config)
            before = psutil.Process().memory_info().rss
            began = time.perf_counter()
            synthesize(config, plan, table)
            seconds[count] = time.perf_counter() - began
            memory[count] = (psutil.Process().memory_info().rss - before) / 1e6
    few, many = counts
    return [
        figure(f"Ray's cost a note, {many:,} template notes", 1000 * seconds[many] / many, 1.0, "ms", 1.0, "lower"),
        figure(f"driver's growth, {many:,} notes against {few:,}", memory[many], memory[few], "MB", None, "lower"),
    ]


def main() -> None:
    """Both figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few notes, one round")
    parser.add_argument("--model", default="smollm2", help="as engine.model")
    parser.add_argument("--only", choices=("generation", "ray"), help="one of the two measurements")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = ray_cost(folder, arguments.quick) if arguments.only != "generation" else []
        show(([generation(folder, arguments.model, arguments.quick)] if arguments.only != "ray" else []) + rows)


if __name__ == "__main__":
    main()
