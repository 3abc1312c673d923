"""A small synthetic run: shards of coloured squares in three data sets, and a checkpoint of a tiny real model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dermfm import checkpoint as checkpoints
from dermfm.config import short_hash, to_dict
from dermfm.evaluate import job
from dermfm.model.dermfm import DermFM, ModelConfig
from dermfm.model.fusion import FusionConfig
from dermfm.model.image import ImageConfig
from dermfm.model.text import TextConfig
from dermfm.records.vocabulary import CLASSES, MALIGNANCY_OF, SUBCLASSES
from shards.manifest import write_manifest
from shards.writer import write_shard

SIZE = 32
CLASSES_USED = (0, 2, 4, 5, 6)
WORDS = sorted(
    {
        w
        for text in [
            *CLASSES,
            *SUBCLASSES,
            "a an the is of lesion photo image skin diagnosis dermoscopic benign "
            "malignant pre cancerous red brown black border sharp irregular patient with",
        ]
        for w in text.lower().split()
    }
)


def make_encoder(folder: Path) -> str:
    """A two-layer BERT with random weights and a word tokenizer, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=len(vocab), max_position_embeddings=64, **sizes).save_pretrained(folder)
    return str(folder)


def make_record(dataset: str, number: int, label: int | None, split: str, group: str, modality: str) -> dict[str, Any]:
    """The fields of one sample with a template and a narrative note."""
    record_id = short_hash([dataset, str(number)])
    name = "unknown" if label is None else CLASSES[label]
    texts = {"template": f"a {name} lesion", "narrative": f"patient {number} with {name} , red <b>border</b>"}
    notes = [
        {"note_id": short_hash([record_id, s]), "strategy": s, "engine": "template", "label_access": "given", "text": t}
        for s, t in texts.items()
    ]
    subclass = next((s for s, c in zip(SUBCLASSES, _subclass_classes(), strict=True) if c == label), None)
    fields = {
        "record_id": record_id,
        "dataset": dataset,
        "source_id": str(number),
        "modality": modality,
        "split": split,
    }
    malignancy = None if label is None else MALIGNANCY_OF[label]
    person = {"sex": ("female", "male")[number % 2], "age": 20.0 + 7 * (number % 9), "fitzpatrick": 1 + number % 6}
    return (
        fields
        | person
        | {
            "site": ("head_neck_face", "trunk", None)[number % 3],
            "label": label,
            "malignancy": malignancy,
            "matched_subclass": subclass,
            "group_id": group,
            "notes": notes,
        }
    )


def _subclass_classes() -> list[int]:
    from dermfm.records.vocabulary import CLASS_OF_SUBCLASS

    return list(CLASS_OF_SUBCLASS.values())


def make_jpeg(label: int | None, rng: np.random.Generator) -> bytes:
    """A square whose colour tells the class, with noise."""
    colour = np.array([40 + 25 * (label or 0), 200 - 20 * (label or 0), 60 + 15 * ((label or 0) % 3)])
    pixels = np.clip(colour + rng.normal(0, 30, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def make_records(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Ours is dermoscopic and in all splits; Other_dermo and Other_clinic are pairs of the same lesions, test only."""
    records = []
    for split, count in (("train", 40), ("valid", 15), ("test", 40)):
        for i in range(count):
            label = CLASSES_USED[i % len(CLASSES_USED)] if i else None
            records.append(
                make_record("Ours", len(records), label, split, f"{split}-{i // 10 * 5 + i % 5}", "dermoscopic")
            )
    for i in range(20):
        label = int(rng.choice([2, 2, 5, 6]))
        records.append(make_record("Other_dermo", i, label, "test", f"pair-{i}", "dermoscopic"))
        records.append(make_record("Other_clinic", i, label, "test", f"pair-{i}", "clinical"))
    return records


def build_shards(folder: Path, records: list[dict[str, Any]], rng: np.random.Generator, damaged: int = -1) -> str:
    """Shards of at most 25 samples with manifest and rows.parquet; the image of record number `damaged` is no image."""
    folder.mkdir()
    infos, rows = [], []
    images = [b"not an image" if i == damaged else make_jpeg(r["label"], rng) for i, r in enumerate(records)]
    for split in ("train", "valid", "test"):
        own = [i for i, r in enumerate(records) if r["split"] == split]
        for k in range(0, len(own), 25):
            name, part = f"{split}-{k // 25:05d}.tar", own[k : k + 25]
            samples = [
                {"__key__": records[i]["record_id"], "jpg": images[i], "json": json.dumps(records[i]).encode()}
                for i in part
            ]
            infos.append(write_shard(folder, name, split, samples))
            fields = ("record_id", "dataset", "label", "group_id")
            rows += [{"shard": name, "row": n} | {f: records[i][f] for f in fields} for n, i in enumerate(part)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    write_manifest(folder, infos, {})
    return str(folder)


def write_checkpoint(run: Path, step: int) -> Path:
    """A committed checkpoint folder with one file of weights; the tests give the model itself."""
    folder = run / "ckpt" / checkpoints.step_name(step)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"weights")
    files = [checkpoints.describe_file(folder / "weights", folder)]
    state = checkpoints.State(step, step * 8, {}, 1, 0, 1, files=files)
    (folder / checkpoints.STATE).write_text(json.dumps(vars(state)))
    (folder / checkpoints.COMPLETE).touch()
    return folder


def tiny_config(encoder: Path) -> ModelConfig:
    """A model of about 0.4 M parameters with random weights; its encoder is made in the folder `encoder`."""
    return ModelConfig(
        image=ImageConfig(name="test_efficientnet", size=SIZE),
        text=TextConfig(name=make_encoder(encoder), pretrained=False, max_tokens=32),
        fusion=FusionConfig(depth=1, width=16, heads=2),
        embed_dim=16,
    )


@pytest.fixture(scope="session")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """The configuration of the tiny model."""
    return tiny_config(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def model(model_config: ModelConfig) -> DermFM:
    """The tiny model, the same in every test."""
    torch.manual_seed(0)
    return DermFM(model_config).eval()


def build_run(folder: Path, model: DermFM, model_config: ModelConfig, patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run directory with one checkpoint, its shards, and the records that they hold; `load_model` gives `model`."""
    rng = np.random.default_rng(0)
    records = make_records(rng)
    shards = build_shards(folder / "shards", records, rng)
    run = folder / "run"
    write_checkpoint(run, 12)
    values = {"run": str(run), "shards": shards, "seed": 3, "strategies": {"template": 1.0}}
    (run / "config.yaml").write_text(json.dumps(values | {"model": to_dict(model_config)}))
    patch.setattr(job, "load_model", lambda path, device="cpu": model)
    return SimpleNamespace(run=run, shards=shards, records=records, model=model)


@pytest.fixture(scope="session")
def make_run() -> Callable[..., SimpleNamespace]:
    """The function that builds a run: (folder, model, model_config, patch)."""
    return build_run


@pytest.fixture(scope="session")
def write_shards() -> Callable[..., str]:
    """The function that writes shards: (folder, records, rng, damaged=-1)."""
    return build_shards


@pytest.fixture
def tiny_run(
    tmp_path: Path, model: DermFM, model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """A run of one's own."""
    return build_run(tmp_path, model, model_config, monkeypatch)
