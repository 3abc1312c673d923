"""Where truth is known: what a model learns of the embedded atlas, against what was drawn.

  python benchmarks/atlas.py [--run runs/atlas-truth] [--quick]

Trains configs/atlas-truth.yaml into the folder unless that is done (it continues where it stopped), and then prints
  - how often the map of a colour word lies more on pixels of that colour than the map of another colour of the same
    lesion does, with the read-out chosen on the validation split (one half: the map does not depend on its word), and
    with the one that `dermfm report` and `dermfm predict` show of every model;
  - F1 of the attributes that its reports state;
  - how often the matching head prefers the own note to another, random or hard.
`--quick` takes few pictures and one epoch: it shows that everything runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's own folder would shadow `shards`

from benchmarks.shared.figures import figure, show

JOBS = ("records", "notes", "shards", "train")
QUICK = [
    "records.atlas.num_dermo=240",
    "records.valid=0.2",
    "records.test=0.2",
    "train.epochs=1",
    "train.validation.every=-1",
]


def write_encoder(folder: Path) -> None:
    """A note encoder of the atlas's few words, without weights: it learns with the rest."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    from dermfm.records.atlas_lesion import COLOURS, STRUCTURES

    said = " ".join(["asymmetric symmetric sharp indistinct mixed border . , ; -", *COLOURS, *STRUCTURES])
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(said.replace("-", " - ").split()))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    BertConfig(
        vocab_size=len(names), hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=64,
    ).save_pretrained(folder)  # fmt: skip


def train(out: Path, quick: bool) -> None:
    """The chain as far as the checkpoint; what is done is kept."""
    from dermfm.config import load
    from dermfm.pipeline import PipelineConfig
    from launch.demo import run_job

    if not (out / "encoder" / "config.json").is_file():  # its last file
        write_encoder(out / "encoder")
    changes = [f"out={out}", *(QUICK if quick else [])]
    config = load(PipelineConfig, "configs/atlas-truth.yaml", changes)
    for job in JOBS:
        if code := run_job(job, getattr(config, job), out / "jobs"):
            raise SystemExit(code)


def measure(out: Path, threads: int) -> list[dict[str, Any]]:
    """All figures of a trained run."""
    from dermfm.checkpoint import load_model
    from dermfm.evaluate.atlas import colour_maps, matching_accuracy, read_cases, report_scores
    from dermfm.evaluate.source import find_source

    model = load_model(str(find_source(str(out), None).checkpoint), "cpu")
    valid, test = (read_cases(out, split, model.image_size) for split in ("valid", "test"))
    maps = colour_maps(model, valid, test)
    print(f"read-out: {maps['read_out']} ({maps['valid_pairs']:.3f} of the pairs of the validation split)")
    rows = [
        figure("colour word on its colour, pairs of colours", maps["pairs"], 0.5, "share", 0.8, threads=threads),
        figure("colour word on its colour, lesions", maps["images"], None, "share", 0.8, threads=threads),
        figure("the same in maps of reports, pairs", maps["shown"]["pairs"], 0.5, "share", None, threads=threads),
        figure("the same in maps of reports, lesions", maps["shown"]["images"], None, "share", None, threads=threads),
    ]
    for kind, value in report_scores(model, test).items():
        goal = 0.9 if kind == "all" else None
        rows.append(figure(f"reports, F1 of {kind}", value, None, "F1", goal, threads=threads))
    for kind, value in matching_accuracy(model, test).items():
        rows.append(figure(f"own note over a {kind} one", value, 0.5, "share", None, threads=threads))
    return rows


def main() -> None:
    """Print a table for people and one JSON object a line for each figure; `goal` is of `ours`, not of the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few pictures, one epoch")
    parser.add_argument("--run", default="", help="folder of the chain; runs/atlas-truth")
    given = parser.parse_args()
    out = Path(given.run or ("runs/atlas-truth-quick" if given.quick else "runs/atlas-truth"))
    train(out, given.quick)
    show(measure(out, int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))))


if __name__ == "__main__":
    main()
