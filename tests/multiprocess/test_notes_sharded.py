"""A language model held by several processes: the tokens of the whole one, also in left-padded and mixed batches."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cluster.local import free_port
from dermfm.config import InputError
from dermfm.notes.engines.protocol import EngineConfig, Request, build_engine, prepare_engine

SCRIPT = Path(__file__).with_name("notes_rank.py")
SCHEMA = {"type": "object", "properties": {"colours": {"type": "array", "items": {"enum": ["red", "brown", "black"]}}}}

pytestmark = pytest.mark.timeout(240)


def requests() -> list[Request]:
    """Prompts of very different lengths, some with a shared beginning, second tries, and options."""
    chats = [(("system", "Write."), ("user", "lesion " * (1 + 3 * k % 11))) for k in range(8)]
    plain = [Request(chat, 1, "", seed=k, attempt=int(k > 5)) for k, chat in enumerate(chats)]
    return [*plain, Request(chats[0], 1, "", seed=9, schema=SCHEMA), Request(chats[3], 0, "", seed=10, schema=SCHEMA)]


@pytest.fixture
def run(launch, tmp_path):
    """run(model, world, fail): the folder that the ranks wrote to."""

    def start(model: Path, world: int, fail: bool = False) -> Path:
        job: dict[str, Any] = {"model": str(model), "out": str(tmp_path), "port": free_port(), "fail": fail}
        done = launch(SCRIPT, world, [json.dumps({**job, "requests": [asdict(r) for r in requests()]})], 200.0)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path

    return start


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)], ids=["heads divided", "heads whole"])
def test_two_processes_give_the_tokens_of_the_whole_model(tiny, run, tmp_path, heads, kv_heads):
    folder = tiny.write_tiny_llm(tmp_path / "model", heads, kv_heads)
    whole = build_engine(EngineConfig(model=str(folder), batch_size=4, max_new_tokens=12))
    expected = [g.text for g in whole.generate(requests())]
    found = json.loads((run(folder, 2) / "texts.json").read_text())
    assert found == expected
    assert len(set(found)) > 5
    total = sum(p.numel() for p in whole.model.parameters())
    held = [json.loads((tmp_path / f"weights-{rank}.json").read_text()) for rank in range(2)]
    assert max(held) < 0.85 * total
    assert sum(held) > total


def test_a_process_that_dies_costs_the_replica_and_not_the_request(tiny, run, tmp_path):
    folder = tiny.write_tiny_llm(tmp_path / "model")
    assert "a process that holds the model failed" in json.loads((run(folder, 2, fail=True) / "lost.json").read_text())


def test_a_number_of_shards_that_cannot_be_is_refused_before_anything_starts(tiny, tmp_path):
    folder = tiny.write_tiny_llm(tmp_path / "model")
    with pytest.raises(InputError, match=r"tensor_parallel: 3 does not divide the model's 64 channels"):
        prepare_engine(EngineConfig(model=str(folder), tensor_parallel=3))
    with pytest.raises(InputError, match="on Ray only"):
        build_engine(EngineConfig(model=str(folder), tensor_parallel=2))
