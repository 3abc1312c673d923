"""Every command of the README runs, in the README's order and in one folder, as a reader would type it.

Sizes are cut down by overrides; commands that need hardware, a scheduler or the suite itself run as far as they can
without: `make` with -n, `sbatch` where there is one.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "dermfm records configs/data/atlas.yaml": ["atlas.num_dermo=96", "atlas.num_clinic=40"],
    "make demo": [
        "ARGS=records.atlas.num_dermo=96 records.atlas.num_clinic=40 notes.limit=4 train.epochs=3 evaluate.resamples=50"
    ],
}


def readme_commands() -> list[str]:
    """The lines of the README's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("source ")]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone to the commands, and keeps what they make out of the real one."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "slurm", "Makefile", "pyproject.toml", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def prepared(command: str, folder: Path) -> list[str]:
    """The words of a command as the test runs it; skips with a reason what cannot run here."""
    words = shlex.split(command)
    if words[0] == "sbatch" and not has_slurm():
        pytest.skip("no SLURM answers here; the script's syntax is checked by tests/unit/test_slurm_scripts.py")
    if words[0] == "make":
        if words[1] != "demo" or len(words) > 2:
            return [*words, "-n"]
        return [*words, *SMALL["make demo"], "--assume-old=venv", f"BIN={Path(sys.executable).parent}"]
    if any(word.startswith("images=data/") for word in words):
        link_data(folder)
    for start, extra in SMALL.items():
        if command.startswith(start):
            words += extra
    return words


def has_slurm() -> bool:
    """Whether a controller answers."""
    return (
        shutil.which("sbatch") is not None
        and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0
    )


def link_data(folder: Path) -> None:
    """`data/` with the data sets' own files under the names that the README uses."""
    data = Path(os.environ.get("DERMFM_DATA", ROOT.parent / "shared" / "data")).resolve()
    if not (data / "metadata.csv").is_file():
        pytest.skip(f"no real images at {data}; set DERMFM_DATA to their folder")
    if (folder / "data").exists():
        return
    (folder / "data").mkdir()
    for table in (data / "native").iterdir():
        (folder / "data" / table.name).symlink_to(table)
    for name, source in (("HAM10000", "HAM10000"), ("MILK10k", "."), ("PAD-UFES-20", "PAD_UFES_20"), ("mine", ".")):
        (folder / "data" / name).symlink_to(data / "images" / source)
    (folder / "data" / "mine.csv").symlink_to(data / "metadata.csv")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", readme_commands())
def test_a_command_of_the_readme_ends_well(command: str, reader: Path) -> None:
    words = prepared(command, reader)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        words, cwd=reader, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_the_readme_has_no_blank_left_to_fill_in() -> None:
    assert not re.findall(r"@[A-Z_]+@", (ROOT / "README.md").read_text())


def test_the_readme_has_the_commands_that_it_promises() -> None:
    commands = readme_commands()
    assert "make demo" in commands
    assert "make test" in commands
    for job in ("records", "notes", "shards", "train", "evaluate", "report", "export", "predict"):
        assert any(c.startswith(f"dermfm {job} ") for c in commands), job


def test_the_demo_left_what_it_promises(reader: Path) -> None:
    demo = reader / "runs" / "demo"
    if not demo.is_dir():
        pytest.skip("the README's demo did not run in this session")
    for name in (
        "records.parquet",
        "notes",
        "shards/manifest.json",
        "config.yaml",
        "ckpt/latest",
        "tb",
        "metrics.jsonl",
    ):
        assert (demo / name).exists(), name
    assert list(demo.glob("eval/*/metrics.json"))
    page = (demo / "report.html").read_text()
    assert "procedural" in page.lower() or "atlas" in page.lower()
    assert 'src="http' not in page
