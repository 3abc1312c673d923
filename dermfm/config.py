"""Configuration: dataclasses beside the code that they configure, YAML files with `extends:`, and a dotlist on top.

`extends: other.yaml` (or a list) at the top of a file starts from the others; inside a part it does so for that part.

The only place that knows OmegaConf. Every field is declared with `key(default, "one doc line")`; bad values raise
`ValueError` from the dataclass's `__post_init__`, which `load` turns into an `InputError` that names file and key.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import errno
import functools
import hashlib
import json
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")
SHOWN_NAMES = 16  # how many valid names a message lists
REQUIRED: Any = "???"  # OmegaConf's mark of a value that must be given
# What a path that the user gave can cause: no such folder, no right to write, a full, read-only or lost disk.
DISK_ERRORS = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR,
    errno.ESTALE,
)  # fmt: skip


class InputError(ValueError):
    """What a user gave cannot work. The message is one line: file or key, what is wrong, what is valid."""


def key(default: Any, doc: str) -> Any:
    """Declare a dataclass field with its default and doc line. Lists, dicts and dataclasses are copied per instance."""
    metadata = {"doc": doc}
    if isinstance(default, type) and dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, valid: Iterable[str]) -> str:
    """'did you mean …' with the closest valid name, else the list of valid names."""
    names = sorted(map(str, valid))
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    more = f", … ({len(names)} in all)" if len(names) > SHOWN_NAMES else ""
    return f"valid: {', '.join(names[:SHOWN_NAMES])}{more}"


def check_choice(name: str, value: str, valid: Iterable[str]) -> None:
    """Raise a ValueError unless `value` is among `valid`; for use in `__post_init__`."""
    valid = list(valid)
    if value not in valid:
        hint = nearest(value, valid)
        choices = f" (one of {', '.join(valid)})" if hint.startswith("did") else ""
        raise ValueError(f"{name}: '{value}' is not valid; {hint}{choices}")


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise a ValueError unless low <= value <= high; for use in `__post_init__`."""
    if not low <= value <= high:
        bound = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"{name}: {value:g} is not valid; it must be {bound}")


def check_share(share: Sequence[int]) -> None:
    """Raise a ValueError unless `share` is [k, n] with 0 <= k < n; for use in `__post_init__`."""
    if len(share) != 2 or not 0 <= share[0] < share[1]:
        raise ValueError(f"share: {list(share)} is not valid; [k, n] with 0 <= k < n is the k-th of n shares")


def read_file(path: str | Path) -> Path:
    """The path itself, if it is a readable file; else an InputError that names the nearest file beside it."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a file is needed")
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, beside) if beside else f"the folder {path.parent} does not exist or is empty"
    raise InputError(f"{path}: no such file; {hint}")


def load(schema: type[T], path: str | Path | None = None, dotlist: Sequence[str] = ()) -> T:
    """Defaults of `schema`, overlaid by the YAML file (with its `extends:` chain) and then by `key=value` items.

    Dataclasses are overlaid key by key. Lists and free dictionaries (`strategies`) are replaced as a whole: what a file
    lists is all there is. `strategies.label=2` on the command line changes one entry.
    Raises InputError for a missing file, broken YAML, an unknown key (with the nearest valid one), a wrong type, a
    required value that is missing, or a value that the schema's own checks refuse.
    """
    merged, origin = OmegaConf.structured(schema), f"{path}" if path else schema.__name__
    for source, layer, item in _layers(path, dotlist):
        merged = _overlay(schema, merged, layer, source, item)
    missing = sorted(_guard(origin, lambda: OmegaConf.missing_keys(merged)))
    if missing:
        doc = {name: text for name, _, text in _fields(schema)}.get(missing[0], "")
        raise InputError(f"{origin}: the key '{missing[0]}' is required ({doc}); give {missing[0]}=<value>")
    return typing.cast(T, _guard(origin, lambda: OmegaConf.to_object(merged)))


def explain(schema: type, path: str | Path | None = None, dotlist: Sequence[str] = ()) -> str:
    """Every key of `schema`, one a line: name, value, type, origin (default, a file, command line), doc line."""
    origins: dict[str, str] = {}
    merged = OmegaConf.structured(schema)
    for source, layer, item in _layers(path, dotlist):
        merged = _overlay(schema, merged, layer, source, item)
        origins.update(dict.fromkeys(_leaves(layer), source))
    lines = []
    try:
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException:  # `${key}` of a required key that is not given yet
        values = OmegaConf.to_container(merged, resolve=False)
    for name, kind, doc in _fields(schema):
        value = functools.reduce(lambda v, part: v[part] if isinstance(v, dict) else None, name.split("."), values)
        where = next((o for n, o in origins.items() if n == name or n.startswith(name + ".")), "default")
        lines.append(f"{name} = {json.dumps(value, default=str)}   [{kind}] ({where})  {doc}")
    return "\n".join(lines)


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, as stored in a run directory."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain containers."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), resolve=True))


def from_dict(schema: type[T], values: dict[str, Any], origin: str) -> T:
    """A `schema` instance from plain containers, checked like a file; `origin` names them in messages."""
    layer = OmegaConf.create(values)
    assert isinstance(layer, DictConfig)
    merged = _overlay(schema, OmegaConf.structured(schema), layer, origin)
    return typing.cast(T, _guard(origin, lambda: OmegaConf.to_object(merged)))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as plain containers; an InputError names the file and line where it is broken."""
    loaded = _guard(str(path), lambda: OmegaConf.load(read_file(path)))
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path}: must hold `key: value` lines at the top level")
    return typing.cast(dict[str, Any], OmegaConf.to_container(loaded, resolve=True))


def canonical_json(value: Any) -> str:
    """One spelling per value: UTF-8, sorted keys, no blanks."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def short_hash(value: Any) -> str:
    """The first 16 hex digits of the sha256 of the canonical JSON of `value`: every id of the project."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def fingerprint(config: Any) -> str:
    """Hash of a resolved configuration."""
    return short_hash(to_dict(config))


def _layers(path: str | Path | None, dotlist: Sequence[str]) -> Iterator[tuple[str, DictConfig, str]]:
    """(source, values, "") of every file of the `extends:` chain, base first; (…, name) of the command line's items."""
    if path is not None:
        yield from ((source, layer, "") for source, layer in _file_layers(Path(path), ()))
    for item in dotlist:
        name, equals, _ = item.partition("=")
        if not equals or not name:
            raise InputError(f"command line: '{item}' is not of the form key=value")
        # YAML reads 24:00:00 as a number to the base of 60; on a command line it is a time.
        item = re.sub(r"=(\d+(:\d+)+)$", r"='\1'", item)
        yield "command line", _guard("command line", lambda i=item: OmegaConf.from_dotlist([i])), name


def _file_layers(path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[str, DictConfig]]:
    path = read_file(path)
    if path.resolve() in seen:
        raise InputError(f"{path}: 'extends' leads back to the file itself")
    layer = _guard(str(path), lambda: OmegaConf.load(path))
    if layer is None or (OmegaConf.is_list(layer) and len(layer) == 0):
        return
    if not isinstance(layer, DictConfig):
        raise InputError(f"{path}: must hold `key: value` lines at the top level")
    bases = layer.pop("extends", None) or []
    for base in [bases] if isinstance(bases, str) else bases:
        yield from _file_layers(path.parent / base, (*seen, path.resolve()))
    yield from _part_layers(layer, path, seen)
    yield str(path), layer


def _part_layers(layer: DictConfig, path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[str, DictConfig]]:
    """The layers on which a part `name: {extends: other.yaml, …}` of a file starts, under the part's name."""
    for name in map(str, layer):
        part = layer._get_node(name)
        if isinstance(part, DictConfig) and not part._is_none() and "extends" in part:
            for source, base in _file_layers(path.parent / str(part.pop("extends")), (*seen, path.resolve())):
                yield source, OmegaConf.create({name: base})


def _guard(source: str, call: Any) -> Any:
    """Run `call`; what OmegaConf, YAML or a `__post_init__` object to becomes one line."""
    try:
        return call()
    except InputError:
        raise
    except OmegaConfBaseException as error:
        name = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise InputError(f"{source}: {name}{str(error.msg or error).splitlines()[0]}") from error
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    except Exception as error:  # YAML's own errors share no useful base class
        if type(error).__module__.startswith("yaml"):
            raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
        raise


def _overlay(schema: type, below: DictConfig, layer: DictConfig, source: str, item: str = "") -> DictConfig:
    """`layer` laid over `below`, its keys checked. `item`: the name that a `key=value` of the command line gives.

    A `???` in a file makes a key required that had a value, which OmegaConf's merge would keep.
    """
    _check_keys(schema, layer, source)
    for name, kind, _ in _fields(schema):
        is_whole = kind.startswith("dict[") and not item.startswith(f"{name}.")
        if is_whole and isinstance(OmegaConf.select(layer, name), DictConfig):
            OmegaConf.update(below, name, {}, merge=False)
    merged: DictConfig = _guard(source, lambda: OmegaConf.merge(below, layer))
    for name in _left_open(layer):
        OmegaConf.update(merged, name, REQUIRED)
    return merged


def _check_keys(schema: type, layer: DictConfig, source: str, prefix: str = "") -> None:
    hints = typing.get_type_hints(schema)
    names = [f.name for f in dataclasses.fields(schema)]
    for name in map(str, layer):
        if name not in names:
            raise InputError(f"{source}: unknown key '{prefix}{name}'; {nearest(name, names)}")
        inner = layer._get_node(name)
        nested, is_list = _nested(hints[name])
        if nested is None:
            continue
        if is_list and isinstance(inner, ListConfig):
            for i in range(len(inner)):
                _check_part(nested, inner._get_node(i), source, f"{prefix}{name}[{i}]")
        elif not is_list:
            _check_part(nested, inner, source, f"{prefix}{name}")


def _check_part(schema: type, node: Any, source: str, name: str) -> None:
    """Check the keys of what stands for a dataclass, if it is not null or `${…}`."""
    if node is None or node._is_none() or node._is_interpolation():
        return
    if not isinstance(node, DictConfig):
        names = ", ".join(f.name for f in dataclasses.fields(schema))
        raise InputError(f"{source}: {name}: '{node}' is not valid; it takes `key: value` lines of {names}")
    _check_keys(schema, node, source, f"{name}.")


def _nested(hint: Any) -> tuple[type | None, bool]:
    """(dataclass inside a type hint, whether it is a list's element)."""
    if dataclasses.is_dataclass(hint):
        return typing.cast(type, hint), False
    is_list = typing.get_origin(hint) is list
    for inner in typing.get_args(hint):
        found, deeper = _nested(inner)
        if found is not None:
            return found, is_list or deeper
    return None, is_list


def _fields(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        nested, is_list = _nested(hints[field.name])
        if nested is not None and not is_list:
            yield from _fields(nested, f"{prefix}{field.name}.")
        else:
            hint = hints[field.name]
            kind = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
            yield prefix + field.name, kind.replace("typing.", ""), field.metadata.get("doc", "")


def _left_open(layer: DictConfig, prefix: str = "") -> Iterator[str]:
    """The keys that stand as `???`; one that refers to such a key is not among them."""
    for name in map(str, layer):
        node = layer._get_node(name)
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            yield from _left_open(node, f"{prefix}{name}.")
        elif isinstance(node, Node) and node._value() == REQUIRED:
            yield f"{prefix}{name}"


def _leaves(layer: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in map(str, layer):
        node = layer._get_node(name)
        if isinstance(node, DictConfig) and len(node) and not node._is_none():
            yield from _leaves(node, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
