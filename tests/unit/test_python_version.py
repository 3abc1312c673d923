"""The code keeps to the oldest Python that pyproject.toml allows: its grammar, and its standard library."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

OLDEST = (3, 10)
# What came into the standard library after 3.10 and is likely to be reached for.
LATER = set(
    """
    tomllib asyncio.TaskGroup asyncio.timeout asyncio.timeout_at asyncio.Runner asyncio.Barrier contextlib.chdir
    datetime.UTC enum.StrEnum enum.ReprEnum enum.EnumCheck enum.verify enum.member enum.nonmember enum.global_enum
    hashlib.file_digest inspect.getmembers_static itertools.batched logging.getLevelNamesMapping
    logging.getHandlerNames math.cbrt math.exp2 math.sumprod math.fma operator.call os.process_cpu_count
    os.listdrives os.path.isjunction os.path.splitroot re.NOFLAG sys.exception sys.activate_stack_trampoline
    sys.monitoring typing.Self typing.Never typing.LiteralString typing.Required typing.NotRequired typing.Unpack
    typing.TypeVarTuple typing.assert_never typing.assert_type typing.reveal_type typing.override
    typing.TypeAliasType typing.ReadOnly typing.dataclass_transform typing.get_overloads typing.TypeIs
    collections.abc.Buffer copy.replace warnings.deprecated wsgiref.types queue.ShutDown glob.translate
    random.binomialvariate calendar.Month calendar.Day uuid.uuid7 compression annotationlib
    """.split()  # noqa: SIM905
)
BUILTINS = {"ExceptionGroup", "BaseExceptionGroup", "PythonFinalizationError"}
METHODS = {"add_note", "full_match"}  # of exceptions and of paths


def too_new(source: str) -> list[str]:
    """What in a source needs a newer Python than OLDEST: a line each."""
    try:
        tree = ast.parse(source, feature_version=OLDEST)
    except SyntaxError as error:
        return [f"line {error.lineno}: {error.msg}"]
    return [f"line {line}: {name}" for name, line in _names(tree) if name in LATER | BUILTINS | METHODS]


def _names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names of the standard library that a module uses, with their line; of other modules too, which do no harm."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
            yield str(node.module), node.lineno
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            base = ast.unparse(node.value).split(".")
            yield ".".join([modules.get(base[0], base[0]), *base[1:], node.attr]), node.lineno
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr, node.lineno
        if isinstance(node, ast.Name):
            yield node.id, node.lineno


def test_the_oldest_python_is_what_the_project_and_its_linter_say(root):
    text = (root / "pyproject.toml").read_text()
    assert re.search(r'^requires-python = ">=3\.10"$', text, re.M)
    assert re.search(r'^target-version = "py310"$', text, re.M)


def test_nothing_needs_a_newer_python(root):
    files = [path for name in ("launch", "cluster", "dermfm", "shards", "benchmarks") for path in python(root / name)]
    assert len(files) > 100
    assert [f"{path}: {told}" for path in files for told in too_new(path.read_text(encoding="utf-8"))] == []


def python(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize(
    "source",
    [
        "import tomllib",
        "from datetime import UTC",
        "import datetime as d\nd.UTC",
        "from typing import Self",
        "import asyncio\nasync def f():\n    async with asyncio.timeout(1): pass",
        "try:\n    pass\nexcept* ValueError:\n    pass",
        "type X = int",
        "def f[T](x: T) -> T: return x",
        "raise ExceptionGroup('a', [])",
        "def f(e):\n    e.add_note('x')",
    ],
)
def test_the_rule_can_fail(source):
    assert too_new(source)


def test_the_rule_lets_pass_what_the_oldest_python_has():
    assert (
        too_new("match 1:\n    case int() | str(): pass\nwith (open('a') as a, open('b') as b): zip(a, b, strict=True)")
        == []
    )
