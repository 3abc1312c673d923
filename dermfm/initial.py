"""`init_from`: weights that a new run starts with: those of a run, of one checkpoint, or of an exported folder.

Only weights are taken: step, schedule, optimizer and data order begin anew. What does not fit (class heads for other
labels, another note encoder) keeps its fresh values and is named.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dermfm import checkpoint, zero
from dermfm.config import InputError, nearest
from dermfm.model.weights import read_state_dict

EXPORT = "model.safetensors"
SHOWN = 8  # names in a line
_log = logging.getLogger(__name__)


def check(path: str) -> None:
    """InputError unless `path` is an exported folder, a run or a checkpoint; nothing is read but names."""
    folder = Path(path)
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise InputError(
            f"init_from: there is no folder {folder}{f'; {nearest(folder.name, beside)}' if beside else ''}"
        )
    if (folder / EXPORT).is_file() or checkpoint.complete_steps(folder / "ckpt"):
        return
    if folder.name.startswith("step-"):
        checkpoint.read_state(folder)
        return
    raise InputError(f"init_from: {folder} holds neither {EXPORT} nor a complete checkpoint under ckpt/")


def read(path: str) -> dict[str, Tensor]:
    """The weights of a run (its newest checkpoint), a checkpoint or an exported folder, on CPU. Checked by hash."""
    folder = Path(path)
    if (folder / EXPORT).is_file():
        return read_state_dict(folder / EXPORT, "init_from")
    found = checkpoint.find(folder)
    return zero.consolidated_weights(found.parent, found.name)


@dataclass(frozen=True)
class Fit:
    """What of the given weights a model can take: `taken` by name, `fresh` with the reason, `unused` of the source."""

    taken: dict[str, Tensor]
    fresh: dict[str, str]
    unused: list[str]


def fit(model: nn.Module, weights: dict[str, Tensor]) -> Fit:
    """Compare name by name and shape by shape; a ViT's positions are resampled to another image size."""
    own = model.state_dict()
    taken, fresh = {}, {}
    for name, target in own.items():
        given = weights.get(name)
        if given is not None and given.shape != target.shape:
            given = _resampled(model, name, given, target)
        if given is None:
            old = weights.get(name)
            fresh[name] = "is not there" if old is None else f"{list(old.shape)}, here {list(target.shape)}"
        else:
            taken[name] = given
    return Fit(taken, fresh, sorted(set(weights) - set(own)))


def _resampled(model: nn.Module, name: str, given: Tensor, target: Tensor) -> Tensor | None:
    if not name.endswith("pos_embed") or given.dim() != 3 or given.shape[2] != target.shape[2]:
        return None
    from timm.layers import resample_abs_pos_embed

    body = model.get_submodule(name.rpartition(".")[0])
    prefix = int(getattr(body, "num_prefix_tokens", 0))
    side = round((target.shape[1] - prefix) ** 0.5)
    if side * side + prefix != target.shape[1]:
        return None
    return resample_abs_pos_embed(given.float(), new_size=[side, side], num_prefix_tokens=prefix)


def start_from(model: nn.Module, path: str, device: str) -> None:
    """Fill `model` (whole, in CPU memory) from `path` on the first rank, then on all. Collective.

    InputError on every rank where nothing of a tower fits.
    """
    told: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            _fill(model, path)
        except InputError as error:
            told = [str(error)]
    dist.broadcast_object_list(told, src=0, device=torch.device(device))
    if told[0] is not None:
        raise InputError(told[0])
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            shared = tensor.data.to(device)
            dist.broadcast(shared, src=0)
            tensor.data.copy_(shared)


def _fill(model: nn.Module, path: str) -> None:
    found = fit(model, read(path))
    if not any(name.startswith(("image.", "text.")) for name in found.taken):
        first = next(iter(found.fresh.items()), ("", "no weights"))
        raise InputError(
            f"init_from: nothing of {path} fits the towers of this model; first: {first[0]} {first[1]}; "
            "give model.* as in the config.yaml of that run"
        )
    model.load_state_dict(found.taken, strict=False)
    _log.info("starting from %s: %d of %d tensors", path, len(found.taken), len(found.taken) + len(found.fresh))
    if found.fresh:
        named = _listed(f"{name} ({why})" for name, why in found.fresh.items())
        _log.warning("init_from: %d tensors do not fit and start anew: %s", len(found.fresh), named)
    if found.unused:
        _log.warning("init_from: %d tensors are not used: %s", len(found.unused), _listed(found.unused))


def _listed(names: Iterable[str]) -> str:
    all_names = list(names)
    more = f", … ({len(all_names)} in all)" if len(all_names) > SHOWN else ""
    return ", ".join(all_names[:SHOWN]) + more
