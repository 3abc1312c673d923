"""The house rules that a program can check: which package imports which, and how long files and functions are.

launch → dermfm → shards; launch, dermfm → cluster; shards and cluster import nothing of ours.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAY_IMPORT = {
    "launch": {"launch", "dermfm", "shards", "cluster"},
    "dermfm": {"dermfm", "shards", "cluster"},
    "shards": {"shards"},
    "cluster": {"cluster"},
}
ONLY_IN = {"omegaconf": {"dermfm/config.py"}, "deepspeed": {"dermfm/zero.py"}}
TORCH_IN_SHARDS = {"shards/loader.py"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def imported(tree: ast.AST, module: str) -> Iterator[str]:
    """Full names of everything that the code of `module` (a.b.c) imports, at any depth; relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            yield ".".join([*base, *filter(None, [node.module])])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            yield from _literal_start(node.args[0])


def _literal_start(node: ast.expr) -> Iterator[str]:
    first = node.values[0] if isinstance(node, ast.JoinedStr) else node
    if isinstance(first, ast.Constant):
        yield str(first.value)


def wrong_imports(file: str, source: str) -> list[str]:
    """What is wrong with the imports of `file` (its path below the root): one line each."""
    package = file.split("/")[0]
    found = []
    for name in imported(ast.parse(source), file.removesuffix(".py").replace("/", ".")):
        top = name.split(".")[0]
        if top in MAY_IMPORT and top not in MAY_IMPORT[package]:
            found.append(f"{file} imports {name}: {package} must not know {top}")
        if file not in ONLY_IN.get(top, {file}):
            found.append(f"{file} imports {name}: only {', '.join(ONLY_IN[top])} may")
        if package == "shards" and top in ("torch", "torchvision") and file not in TORCH_IN_SHARDS:
            found.append(f"{file} imports {name}: only {', '.join(TORCH_IN_SHARDS)} may")
    return found


def too_long(file: str, source: str) -> list[str]:
    """The file or those of its functions that are longer than the house allows."""
    lines = source.count("\n")
    found = [f"{file} has {lines} lines"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{file}: {node.name} has {length} lines")
    return found


def sources(root: Path, *folders: str) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def code(root: Path) -> dict[str, str]:
    return dict(sources(root, *MAY_IMPORT))


def test_no_import_points_back(code):
    assert len(code) > 50
    assert [line for file, source in code.items() for line in wrong_imports(file, source)] == []


def test_files_and_functions_stay_short(code, root):
    everything = code | dict(sources(root, "benchmarks", "tests"))
    assert [line for file, source in everything.items() for line in too_long(file, source)] == []


def test_every_module_says_what_it_is_for(code):
    empty = [file for file, source in code.items() if source.strip() and not ast.get_docstring(ast.parse(source))]
    assert empty == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("shards/made_up.py", "import dermfm.config"),
        ("shards/made_up.py", "from cluster import process"),
        ("shards/made_up.py", "def f():\n    import torch"),
        ("cluster/made_up.py", "from shards.manifest import Manifest"),
        ("dermfm/made_up.py", "from launch.cli import main"),
        ("dermfm/notes/made_up.py", "if True:\n    import omegaconf"),
        ("dermfm/made_up.py", "from deepspeed.utils import zero_to_fp32"),
        ("launch/made_up.py", "from omegaconf import OmegaConf"),
        ("dermfm/made_up.py", "import importlib\nimportlib.import_module(f'launch.{name}')"),
        ("dermfm/model/made_up.py", "from ...launch import cli"),
    ],
)
def test_the_rule_of_imports_can_fail(file, source):
    assert wrong_imports(file, source)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("launch/made_up.py", "import dermfm.config, shards.manifest, cluster.process, torch"),
        ("dermfm/config.py", "import omegaconf"),
        ("dermfm/zero.py", "import deepspeed"),
        ("shards/loader.py", "import torch"),
        ("dermfm/model/made_up.py", "from .attention import attention\nfrom ..losses import clip"),
    ],
)
def test_the_rule_of_imports_lets_the_arrows_pass(file, source):
    assert wrong_imports(file, source) == []


def test_the_rule_of_lengths_can_fail():
    body = "".join(f"    x{i} = {i}\n" for i in range(MAX_FUNCTION_LINES))
    assert too_long("dermfm/made_up.py", f"def f():\n{body}") == ["dermfm/made_up.py: f has 61 lines"]
    assert too_long("dermfm/made_up.py", "x = 1\n" * 401) == ["dermfm/made_up.py has 401 lines"]
