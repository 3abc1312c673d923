"""What every test may use: the repository's root and the shared real data, where it lies."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and tables: $DERMFM_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("DERMFM_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "metadata.csv").is_file():
        pytest.skip(f"no real images at {folder}; set DERMFM_DATA to their folder")
    return folder.resolve()


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of one, for the tests of a module."""
    from cluster.process import close_group, from_environment, start_group

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # first set: so that what the group sets is taken back as well
            patch.delenv(name)
        start_group(from_environment("cpu"))
        yield
        close_group()


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """serve(folder, knows_ranges=True): a real HTTP server over a folder (tests/web.py), stopped after the test."""
    module = _module("web")
    servers: list[Any] = []

    def start(folder: Path | str, knows_ranges: bool = True) -> Any:
        servers.append(module.Web(folder, knows_ranges))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The module tests/tiny_llm.py: language models of random weights."""
    return _module("tiny_llm")


def _module(name: str) -> Any:
    """A module that lies beside this file, which is on no path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
