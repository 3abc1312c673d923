"""The model: a training step against open_clip's CoCa, packed against padded notes, decoding with and without cache.

    python benchmarks/model.py [--quick]

The towers are of equal size on both sides (vision 384 × 12, patch 16, 224 px; text 384 × 6; decoder 384 × 6; 30,522
words; notes of 4 to 76 tokens, 40 in the mean), the batch (16), the optimizer (AdamW, fused as in the trainer) and the
precision (bf16 autocast) are the same. Each side is a process of its own, so that its peak memory is its own; their
steps take turns. Times are medians. --quick takes small towers and two rounds: it shows that everything runs, its
ratios mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script's own folder would shadow `shards`

import numpy as np

from benchmarks.shared.figures import figure, show

SIDES = ("ours", "open_clip", "matching", "packed", "padded", "cached", "uncached", "maps")


@dataclass(frozen=True)
class Sizes:
    """What both sides are built of."""

    image: str = "vit_small_patch16_224"
    pixels: int = 224
    vision_depth: int = 12
    width: int = 384
    heads: int = 6
    depth: int = 6
    vocabulary: int = 30_522
    longest: int = 76
    batch: int = 16
    decoded: int = 128
    rounds: int = 7


FULL = Sizes()
QUICK = Sizes("test_vit", 160, 3, 64, 2, 2, 2_000, 76, 8, 128, 2)


def lengths_of(sizes: Sizes) -> np.ndarray:
    """Tokens of each note: from 4 to the longest in equal steps, 40 in the mean."""
    return np.linspace(4, sizes.longest, sizes.batch).round().astype(int)


def tokens_of(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, longest] with 0 as padding, lengths [B]); every note starts with 2 and ends with 3."""
    rng, lengths = np.random.default_rng(0), lengths_of(sizes)
    tokens = rng.integers(5, sizes.vocabulary, (sizes.batch, sizes.longest))
    for row, length in zip(tokens, lengths, strict=True):
        row[0], row[length - 1], row[length:] = 2, 3, 0
    return tokens, lengths


def encoder_folder(sizes: Sizes, folder: Path) -> str:
    """A BERT of the asked size with a word tokenizer of the asked vocabulary, as a Hugging Face folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(sizes.vocabulary - 4))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    BertConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads, intermediate_size=4 * sizes.width, max_position_embeddings=512,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


class Engine:
    """What an optimizer step asks of DeepSpeed, without it: both sides then pay for the same things."""

    def __init__(self, model: Any) -> None:
        self.module = model

    def __call__(self, phase: str, **inputs: Any) -> Any:
        """One phase of the model under bf16 autocast."""
        import torch

        with torch.autocast("cpu", torch.bfloat16):
            return self.module(phase, **inputs)

    def backward(self, loss: Any, scale_wrt_gas: bool = False) -> None:
        """Accumulate gradients."""
        loss.backward()


def our_model(sizes: Sizes, packed: bool = True, fusion: str = "none", decoded: int = 0) -> Any:
    """Our model in training mode, without pretrained weights."""
    import torch

    from dermfm.model.decoder import DecoderConfig
    from dermfm.model.dermfm import DermFM, ModelConfig
    from dermfm.model.fusion import FusionConfig
    from dermfm.model.image import ImageConfig
    from dermfm.model.text import TextConfig

    torch.manual_seed(0)
    width, heads = sizes.width, sizes.heads
    with tempfile.TemporaryDirectory() as folder:
        text = TextConfig(
            name=encoder_folder(sizes, Path(folder)), pretrained=False, train_blocks=-1, packed=packed,
            max_tokens=max(sizes.longest, decoded),
        )  # fmt: skip
        config = ModelConfig(
            image=ImageConfig(name=sizes.image, size=sizes.pixels),
            text=text,
            fusion=FusionConfig(kind=fusion, depth=sizes.depth, width=width, heads=heads),
            decoder=DecoderConfig(depth=sizes.depth, width=width, heads=heads),
            embed_dim=width,
        )
        return DermFM(config).train()


def our_step(sizes: Sizes, matching: bool = False) -> Callable[[], None]:
    """One training step of ours: contrastive and captioning, with matching where asked, and AdamW."""
    import torch
    import torch.distributed as dist

    from dermfm.objectives import ObjectiveConfig
    from dermfm.samples import Batch
    from dermfm.step import optimizer_step

    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}.store", rank=0, world_size=1)
    model = our_model(sizes, fusion="cross" if matching else "none")
    engine = Engine(model)
    optimizer = optimizer_of(model)
    weights = {"contrastive": 1.0, "caption": 2.0, "matching": 1.0 if matching else 0.0}
    objectives = ObjectiveConfig(**weights, classify_image=0.0, classify_text=0.0, classify_fused=0.0)
    tokens, lengths = (torch.from_numpy(x) for x in tokens_of(sizes))
    each = torch.arange(sizes.batch)
    batch = Batch(
        pixels=pixels_of(sizes), tokens=tokens, lengths=lengths, labels=torch.full_like(each, -1),
        weight=torch.ones(sizes.batch), group=each, text=each + 1000, indices=each,
        record_ids=[str(i) for i in range(sizes.batch)],
    )  # fmt: skip

    def step() -> None:
        optimizer_step(engine, batch, sizes.batch, objectives)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def optimizer_of(model: Any) -> Any:
    """AdamW as the trainer has it in host memory, for both sides: fused, one pass without temporaries of their size."""
    import torch

    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def pixels_of(sizes: Sizes) -> Any:
    """uint8 pixels [B, 3, S, S]."""
    import torch

    shape = (sizes.batch, 3, sizes.pixels, sizes.pixels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def open_clip_step(sizes: Sizes) -> Callable[[], None]:
    """One training step of open_clip's CoCa with its own loss, and AdamW."""
    import torch
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    torch.manual_seed(0)
    width, heads, depth = sizes.width, sizes.heads, sizes.depth
    text = {"context_length": sizes.longest, "vocab_size": sizes.vocabulary, "width": width, "heads": heads}
    vision = {"image_size": sizes.pixels, "patch_size": 16, "width": width, "layers": sizes.vision_depth}
    model = CoCa(
        width,
        multimodal_cfg={**text, "layers": depth},
        text_cfg={**text, "layers": depth, "embed_cls": True, "output_tokens": True},
        vision_cfg={**vision, "head_width": width // heads, "attentional_pool": True, "output_tokens": True},
    ).train()
    loss_of = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0, pad_id=0)
    optimizer = optimizer_of(model)
    pixels, tokens = pixels_of(sizes), torch.from_numpy(tokens_of(sizes)[0])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = model((pixels.float() - 128) / 64, tokens)
            wanted = ("image_features", "text_features", "logits", "labels", "logit_scale")
            sum(loss_of(**{name: out[name] for name in wanted})).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def text_pass(sizes: Sizes, packed: bool) -> Callable[[], None]:
    """The text tower forward and backward over notes of which half the padded tokens are real."""
    import torch

    tower = our_model(sizes, packed).text
    tokens, lengths = (torch.from_numpy(x) for x in tokens_of(sizes))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            tower(tokens, lengths)[1].float().square().sum().backward()
        tower.zero_grad(set_to_none=True)

    return step


def decoding(sizes: Sizes, cache: bool) -> Callable[[], None]:
    """Greedy decoding of a batch to the full number of tokens, with or without cache."""
    model = our_model(sizes, decoded=sizes.decoded + 1).eval()
    import torch

    with torch.no_grad():
        tokens = model.image(pixels_of(sizes))[0]
    return lambda: model.decoder.generate(tokens, max_tokens=sizes.decoded, cache=cache, stop=False)


def maps(sizes: Sizes) -> Callable[[], None]:
    """Attention maps of every word of a batch of notes, from pixels and tokens to weights."""
    import torch

    model = our_model(sizes, fusion="cross").eval()
    pixels, (tokens, lengths) = pixels_of(sizes), (torch.from_numpy(x) for x in tokens_of(sizes))

    def step() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model.fuse(model.encode_image(pixels)[1], model.encode_text(tokens, lengths)[1], lengths, True)

    return step


def serve(side: str, sizes: Sizes) -> None:
    """One side's process: a JSON line a request, seconds of one step, and in the end peak memory and parameters."""
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "ours": lambda: our_step(sizes),
        "matching": lambda: our_step(sizes, matching=True),
        "open_clip": lambda: open_clip_step(sizes),
        "packed": lambda: text_pass(sizes, True),
        "padded": lambda: text_pass(sizes, False),
        "cached": lambda: decoding(sizes, True),
        "uncached": lambda: decoding(sizes, False),
        "maps": lambda: maps(sizes),
    }
    load_libraries(side)
    libraries = memory_bytes("VmRSS")
    step = makers[side]()
    step()  # warm: kernels chosen, optimizer states there
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)
    print(memory_bytes("VmHWM"), libraries, flush=True)


def load_libraries(side: str) -> None:
    """Import what a side's step is made of, before anything is built."""
    if side == "open_clip":
        import open_clip.coca_model
        import open_clip.loss  # noqa: F401
    else:
        import dermfm.model.dermfm
        import dermfm.step  # noqa: F401


def memory_bytes(which: str) -> int:
    """VmRSS or VmHWM (peak) of this process; ru_maxrss would count what the parent had before it started us."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {which}")


class Side:
    """A side's process, asked for one step at a time."""

    def __init__(self, name: str, quick: bool) -> None:
        command = [sys.executable, __file__, "--side", name, *(["--quick"] if quick else [])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.seconds: list[float] = []
        while (line := self._answer()) != "ready":
            print(line, file=sys.stderr)

    def step(self) -> None:
        """Time one step."""
        self.seconds.append(float(self._ask("go")))

    def end(self) -> SimpleNamespace:
        """Stop the process; median seconds, peak bytes, and those of the imported libraries alone."""
        peak, libraries = map(int, self._ask("end").split())
        self._process.wait()
        return SimpleNamespace(seconds=statistics.median(self.seconds), bytes=peak, libraries=libraries)

    def _ask(self, word: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            assert self._process.stderr is not None
            raise SystemExit(f"a side of the benchmark died:\n{self._process.stderr.read()[-3000:]}")
        return line


def take_turns(names: tuple[str, ...], sizes: Sizes, quick: bool) -> dict[str, SimpleNamespace]:
    """Median seconds and peak memory of each side; their steps alternate, and only one works at a time."""
    sides = {name: Side(name, quick) for name in names}
    for _ in range(sizes.rounds):
        for side in sides.values():
            side.step()
    return {name: side.end() for name, side in sides.items()}


def measure(sizes: Sizes, quick: bool) -> list[dict[str, Any]]:
    """All figures."""
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    steps = take_turns(("ours", "open_clip", "matching"), sizes, quick)
    text = take_turns(("packed", "padded"), sizes, quick)
    notes = take_turns(("cached", "uncached"), sizes, quick)
    drawn = take_turns(("maps",), sizes, quick)["maps"]
    ours, other, matching = steps["ours"], steps["open_clip"], steps["matching"]
    words = int(lengths_of(sizes).sum())
    pair = "contrastive + captioning step / open_clip's CoCa"
    return [
        figure(f"{pair}, time", ours.seconds, other.seconds, "s", 0.85, "lower", threads),
        figure(f"{pair}, peak memory", ours.bytes / 1e9, other.bytes / 1e9, "GB", 0.8, "lower", threads),
        figure(f"{pair}, peak memory without imported libraries", (ours.bytes - ours.libraries) / 1e9,
               (other.bytes - other.libraries) / 1e9, "GB", None, "lower", threads),
        figure("text tower, packed / padded notes", words / text["packed"].seconds, words / text["padded"].seconds,
               "tokens/s", 1.3, "higher", threads),
        figure(f"decoding {sizes.decoded} tokens, cached / uncached", sizes.batch / notes["cached"].seconds,
               sizes.batch / notes["uncached"].seconds, "notes/s", 3.0, "higher", threads),
        figure("step with matching / without", matching.seconds, ours.seconds, "s", None, "lower", threads),
        figure("step with matching / CoCa's step", matching.seconds, other.seconds, "s", None, "lower", threads),
        figure("maps of a batch / CoCa's step", drawn.seconds, other.seconds, "s", None, "lower", threads),
    ]  # fmt: skip


def main() -> None:
    """Print a table for people and one JSON object a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small towers and two rounds")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    if given.side:
        serve(given.side, sizes)
        return
    rows = measure(sizes, given.quick)
    show(rows)
    missed = [r["figure"] for r in rows if r["goal"] and (r["ratio"] > r["goal"]) == (r["better"] == "lower")]
    print(json.dumps({"missed": missed}), file=sys.stderr)


if __name__ == "__main__":
    main()
