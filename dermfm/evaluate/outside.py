"""Models that others trained, as encoders for our protocol: open_clip's and Hugging Face's two-tower models.

  open_clip:<folder>                 a folder with open_clip_config.json and weights
  open_clip:<name>:<tag or file>     an architecture of open_clip with the weights of a tag (its cache, or the hub)
  open_clip:hf-hub:<org>/<name>      of the hub
  hf:<folder or org/name>            anything AutoModel gives image and text features of (CLIP, SigLIP, …)
  <folder>                           either of the two, by the files it holds
Images are decoded as for our own models (shorter side to the model's size, centre square) and normalised by its mean
and deviation.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermfm.config import InputError, nearest, read_yaml
from dermfm.evaluate.embed import Encoders
from dermfm.evaluate.records import CLASS_SETS

OPEN_CLIP, HF = "open_clip:", "hf:"
OPEN_CLIP_FILE, HF_FILE = "open_clip_config.json", "config.json"
PROMPTS = Path(__file__).with_name("prompts.yaml")
MAX_TOKENS = 512  # where a tokenizer knows no limit of its own


def load_outside(name: str, device: str, prompts: Mapping[str, list[str]] | None = None) -> Encoders:
    """The encoders that `name` stands for (see the module). InputError where it cannot be had.

    `prompts`: class set → templates, in place of those of prompts.yaml.
    """
    family, source = split_name(name)
    templates = _templates(source, prompts or {})
    build = _open_clip if family == OPEN_CLIP else _hugging_face
    try:
        return build(source, device, templates)
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"model: '{name}' cannot be loaded ({_first_line(error)}); give a local folder, {family}<folder>"
        ) from error


def split_name(name: str) -> tuple[str, str]:
    """("open_clip:" or "hf:", what follows). InputError for a folder that holds neither kind of model."""
    for family in (OPEN_CLIP, HF):
        if name.startswith(family):
            source = name.removeprefix(family)
            if ("/" in source and source.startswith((".", "/"))) and not Path(source).exists():
                raise InputError(f"model: no such folder: {source}")
            return family, source
    folder = Path(name)
    if (folder / OPEN_CLIP_FILE).is_file():
        return OPEN_CLIP, name
    if (folder / HF_FILE).is_file():
        return HF, name
    if (folder / "ckpt").is_dir():
        raise InputError(f"model: {name} is a run directory; give run={name}")
    said = f"{name} holds neither {OPEN_CLIP_FILE} nor {HF_FILE}" if folder.is_dir() else f"no such folder: {name}"
    raise InputError(f"model: {said}; give open_clip:<name>, hf:<name> or a folder of such a model")


def _templates(name: str, given: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    for class_set, templates in given.items():
        if class_set not in CLASS_SETS:
            raise InputError(f"prompts: there is no class set '{class_set}'; {nearest(class_set, CLASS_SETS)}")
        for template in templates:
            if "{}" not in template:
                raise InputError(f"prompts.{class_set}: '{template}' has no {{}} where the class word stands")
    entry = next(m for m in read_yaml(PROMPTS)["models"] if m["name"] in name.lower())
    known = {s: tuple(entry.get(s, entry["classes"])) for s in CLASS_SETS}
    return known | {s: tuple(t) for s, t in given.items()}


def _open_clip(source: str, device: str, templates: dict[str, tuple[str, ...]]) -> Encoders:
    import open_clip

    if Path(source).is_dir():
        name, tag = f"local-dir:{source}", None
    elif source.startswith("hf-hub:"):
        name, tag = source, None
    else:
        name, _, tag = source.partition(":")
        _check_open_clip(name, tag)
    model = open_clip.create_model(name, pretrained=tag, device=device, require_pretrained=True).eval()
    shape = model.visual.image_size
    size = shape[0] if isinstance(shape, (tuple, list)) else shape
    normalise = _normalise(*_statistics(open_clip.get_model_preprocess_cfg(model)), device)
    tokenizer = _OpenClipTokens(open_clip.get_tokenizer(name))
    width = len(tokenizer([""])["input_ids"][0])

    def image(pixels: Tensor) -> dict[str, Tensor]:
        return _both(model.encode_image(normalise(pixels)))

    def text(tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        return {"embedding": _unit(model.encode_text(tokens[:, :width]))}

    return Encoders(image, text, int(size), tokenizer, width, templates, weights_identity(model))


def _check_open_clip(name: str, tag: str) -> None:
    """InputError for an architecture or a tag that open_clip does not know, and for weights not named."""
    import open_clip

    if open_clip.get_model_config(name) is None:
        raise InputError(f"model: open_clip has no model '{name}'; {nearest(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tag:
        raise InputError(
            f"model: open_clip:{name} names no weights; open_clip:{name}:<{' | '.join(tags[:4]) or 'file'}>"
        )
    if tag not in tags and not Path(tag).is_file():
        raise InputError(f"model: '{tag}' is neither a file nor weights of open_clip's {name}; {nearest(tag, tags)}")


class _OpenClipTokens:
    """An open_clip tokenizer with the call of a Hugging Face one; its rows are padded to the model's own length."""

    pad_token_id = 0

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": self._tokenizer(list(texts)).tolist()}


def _hugging_face(source: str, device: str, templates: dict[str, tuple[str, ...]]) -> Encoders:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(source, dtype=torch.float32).to(device).eval()
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise InputError(
            f"model: {type(model).__name__} of '{source}' does not embed images and texts; give a CLIP-like one"
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    processor = AutoImageProcessor.from_pretrained(source)
    normalise = _normalise(processor.image_mean, processor.image_std, device)
    limit = min(int(getattr(model.config.text_config, "max_position_embeddings", MAX_TOKENS)), MAX_TOKENS)
    padded = "siglip" in str(model.config.model_type)  # trained on rows filled up to their full length, without a mask
    size = int(model.config.vision_config.image_size)

    def image(pixels: Tensor) -> dict[str, Tensor]:
        return _both(_pooled(model.get_image_features(pixel_values=normalise(pixels))))

    def text(tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        tokens = tokens[:, :limit]
        mask = torch.arange(tokens.shape[1], device=tokens.device)[None] < lengths[:, None]
        given = {} if padded else {"attention_mask": mask.long()}
        return {"embedding": _unit(_pooled(model.get_text_features(input_ids=tokens, **given)))}

    words = functools.partial(_padded, tokenizer, limit) if padded else tokenizer
    return Encoders(image, text, size, _Named(words, tokenizer.pad_token_id), limit, templates, weights_identity(model))


class _Named:
    """A tokenizer function with the padding token that batches are filled up with."""

    def __init__(self, words: Callable[..., Any], pad: int | None) -> None:
        self._words, self.pad_token_id = words, pad

    def __call__(self, texts: list[str], **settings: Any) -> Any:
        return self._words(texts, **settings)


def _padded(tokenizer: Any, limit: int, texts: list[str], **_: Any) -> Any:
    return tokenizer(texts, truncation=True, max_length=limit, padding="max_length")


def _pooled(found: Any) -> Tensor:
    """Features [B, d], which newer releases of transformers return inside an output object."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _statistics(preprocess: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    return list(preprocess["mean"]), list(preprocess["std"])


def _normalise(mean: list[float], std: list[float], device: str) -> Callable[[Tensor], Tensor]:
    middle, width = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (mean, std))
    return lambda pixels: (pixels.to(middle.dtype) - middle) / width


def _both(vectors: Tensor) -> dict[str, Tensor]:
    """The embedding, and as features for probes the same before it is scaled to length 1."""
    return {"embedding": _unit(vectors), "features": vectors.float()}


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)


def weights_identity(model: nn.Module) -> str:
    """A hash of every weight: stored embeddings belong to it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
