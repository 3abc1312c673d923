"""A tiny image-text world for runs over processes: random towers, 40 drawn samples in two shards, and launched ranks.

The samples are uneven on purpose: one image cannot be decoded, some labels are unknown, some records have no note,
some share a group, and notes of one class repeat each other word for word.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SPLITS = {"train": 40, "valid": 12}
BAD_IMAGE = 5
WORDS = "macule papule nodule plaque red brown blue sharp indistinct border lesion arm leg face benign malignant"
WORD_LIST = WORDS.split()


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., Path]:
    """write_shards(folder, sizes, sample_of): train shards of these sizes and their manifest; the folder.

    `sample_of(number)` gives the samples, numbered through all shards.
    """
    from shards.manifest import write_manifest
    from shards.writer import write_shard

    def write(folder: Path, sizes: Sequence[int], sample_of: Callable[[int], dict]) -> Path:
        numbers = iter(range(sum(sizes)))
        infos = [
            write_shard(folder, f"train-{i:05d}.tar", "train", [sample_of(next(numbers)) for _ in range(size)])
            for i, size in enumerate(sizes)
        ]
        write_manifest(folder, infos, {})
        return folder

    return write


@pytest.fixture(scope="session")
def text_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with 32 channels and its WordPiece tokenizer, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()

    folder = tmp_path_factory.mktemp("text-tower")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORD_LIST])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of `train` and one of `valid` with `SPLITS` samples, written by the project's writer."""
    from shards.manifest import write_manifest
    from shards.writer import write_shard

    folder = tmp_path_factory.mktemp("shards")
    samples = [_sample(i) for i in range(SPLITS["train"])]
    parts = [samples[:25], samples[25:]]
    infos = [write_shard(folder, f"train-{i:05d}.tar", "train", part) for i, part in enumerate(parts)]
    held_out = [_sample(100 + i) for i in range(SPLITS["valid"])]
    infos.append(write_shard(folder, "valid-00000.tar", "valid", held_out))
    strategies = Counter(n["strategy"] for s in samples for n in json.loads(s["json"])["notes"])
    write_manifest(folder, infos, {"strategies": dict(strategies)})
    return folder


def _sample(number: int) -> dict[str, str | bytes]:
    rng = np.random.default_rng(number)
    label = number % 4
    texts = [f"{WORD_LIST[label]} {WORD_LIST[4 + label % 3]} lesion"]  # one text for a whole class
    texts += [" ".join(rng.choice(WORD_LIST, 3 + number % 5))] * (number % 3 > 0)
    notes = [{"strategy": "template", "text": text} for text in texts] if number % 9 else []
    fields = {
        "record_id": f"r{number:03d}",
        "group_id": f"g{number // 2 if number < 10 else number}",
        "label": None if number % 7 == 3 else label,
        "notes": notes,
    }
    colour = np.array([60, 110, 160, 210])[label] + rng.integers(-20, 20, (8, 8, 3))
    encoded = io.BytesIO()
    Image.fromarray(colour.clip(0, 255).astype(np.uint8)).resize((40, 36)).save(encoded, "JPEG", quality=90)
    image = b"no image at all" if number == BAD_IMAGE else encoded.getvalue()
    return {"__key__": fields["record_id"], "jpg": image, "json": json.dumps(fields).encode()}


@pytest.fixture(scope="session")
def config_values(text_tower: Path, shard_folder: Path) -> dict[str, Any]:
    """Values of a TrainConfig (without `run`) of seconds: 32-pixel images, all objectives, a batch of 8, 8 steps."""
    return {
        "shards": str(shard_folder),
        "model": {
            "image": {"name": "test_efficientnet", "size": 32},
            "text": {"name": str(text_tower), "max_tokens": 16, "train_blocks": 1},
            "fusion": {"depth": 1, "width": 16, "heads": 2},
            "embed_dim": 16,
        },
        "objectives": {"matching": 0.5, "classify_text": 0.2, "classify_fused": 0.2},
        "optimizer": {"lr": 3e-3, "image_lr": 1e-3, "text_lr": 1e-3},
        "contrastive_batch": 8,
        "micro_batch": 2,
        "epochs": 1.6,
        "checkpoint_every": 16,
        "log_every": 1,
        "max_bad_fraction": 0.5,
        "threads": 1,
        "device": "cpu",
    }


@pytest.fixture(scope="session")
def environment(root: Path) -> dict[str, str]:
    """The environment of a launched process: ours importable, one thread, no hub."""
    fixed = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    return {**{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}, **fixed}


@pytest.fixture(scope="session")
def warm(environment: dict[str, str]) -> Iterator[Any]:
    """The module `warm`, its server started; at the end no rank stays."""
    spec = importlib.util.spec_from_file_location("warm", Path(__file__).with_name("warm.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.start_server(environment)
    yield module
    module.end_all()


@pytest.fixture(scope="session")
def launch(
    warm: Any, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """launch(script, world, arguments, timeout_s) → the finished job of `world` ranks, its output captured."""

    def start(script: Path, world: int, arguments: Sequence[str] = (), timeout_s: float = 110.0) -> Any:
        folder = tmp_path_factory.mktemp("job")
        files = folder / "out", folder / "err"
        ranks = [warm.Rank(script, arguments, {**environment, **place}, *files) for place in warm.places(world)]
        code, (out, err) = warm.run_job(ranks, timeout_s), ranks[0].told()
        if code is None:
            pytest.fail(f"not done after {timeout_s:.0f} s\n{out[-3000:]}\n{err[-3000:]}")
        return subprocess.CompletedProcess([str(script), *arguments], code, out, err)

    return start
