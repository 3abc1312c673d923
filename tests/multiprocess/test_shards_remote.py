"""Remote shards over processes: workers and ranks that share a cache, a killed download and its successor, real S3."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.manifest import Manifest, ShardError, write_manifest
from shards.reader import ShardReader
from shards.storage import Remote
from shards.writer import write_shard

SCRIPT = Path(__file__).with_name("stream_rank.py")
SIZES = [9, 14, 4]
LARGE = 3_000_000  # bytes of a shard that takes a while over a slow line
FETCH = """
import json, sys
from shards.manifest import Manifest
from shards.reader import ShardReader
from shards.storage import Remote
job = json.loads(sys.argv[1])
manifest = Manifest.load(job["url"], Remote(cache=job["cache"], timeout_s=5, attempts=2))
print(json.dumps(ShardReader(manifest.folder, manifest.shards, manifest.remote).read(0, 0)["__key__"].decode()))
"""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_shards) -> Path:
    """Three shards of samples with fields that need no decoding: an image that is none keeps its place anyway."""
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES, sample_of)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """One shard of a few megabytes."""
    out = tmp_path_factory.mktemp("large")
    info = write_shard(out, "train-00000.tar", "train", [{"__key__": "a", "jpg": os.urandom(LARGE)}])
    write_manifest(out, [info], {})
    return out


def sample_of(number: int) -> dict[str, str | bytes]:
    pixels = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = io.BytesIO()
    Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC).save(image, "JPEG")
    fields = {"record_id": f"r{number}", "label": 1, "notes": [{"strategy": "open", "text": f"note {number}"}]}
    return {"__key__": f"r{number}", "jpg": image.getvalue(), "json": json.dumps(fields).encode()}


def environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def stream(root: Path, url: str, world: int, workers: int, remote: dict) -> list[dict]:
    """What `world` processes read side by side, in the order of the stream."""
    processes = []
    for rank in range(world):
        job = {"folder": url, "start": 0, "batch": 8, "rank": rank, "world": world, "workers": workers, "steps": 5}
        command = [sys.executable, str(SCRIPT), json.dumps(job | {"remote": remote})]
        processes.append(subprocess.Popen(command, env=environment(root), stdout=subprocess.PIPE, text=True))
    try:
        lines = [line for p in processes for line in p.communicate(timeout=200)[0].splitlines()]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * world
    return sorted(map(json.loads, lines), key=lambda line: line["index"])


def fetch(root: Path, url: str, cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", FETCH, json.dumps({"url": url, "cache": str(cache)})]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(root), text=True, **pipes)


def wait_for_part(cache: Path, process: subprocess.Popen) -> Path:
    """The temporary file of a download once bytes have come."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for part in cache.glob("*.part"):
            return part
        time.sleep(0.01)
    raise AssertionError(f"no download began: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def alone(root, folder) -> list[dict]:
    return stream(root, str(folder), world=1, workers=0, remote={})


def test_ranks_and_workers_that_share_a_cache_read_the_local_stream_and_ask_for_each_shard_about_once(
    root, folder, alone, serve, tmp_path
):
    web = serve(folder)
    assert stream(root, web.url, 2, 1, {"cache": str(tmp_path / "cache")}) == alone
    asked = web.count(".tar")
    assert len(SIZES) <= asked <= 2 * len(SIZES)  # two processes may begin one shard in the same instant
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".idx"] * 3 + [".tar"] * 3


def test_after_a_kill_9_the_successor_downloads_anew_without_waiting(root, large, serve, tmp_path):
    web, cache = serve(large), tmp_path / "cache"
    web.delay_s = 0.05  # ten seconds for the shard
    victim = fetch(root, web.url, cache)
    part = wait_for_part(cache, victim)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait(10)
    assert [p.name for p in cache.glob("*.tar*")] == [part.name]
    web.delay_s = 0.0
    began = time.monotonic()
    successor = fetch(root, web.url, cache)
    out, err = successor.communicate(timeout=60)
    assert (successor.returncode, json.loads(out)) == (0, "a"), err
    assert time.monotonic() - began < 40
    info = Manifest.load(large).shards[0]
    assert (cache / f"{info.sha256}.tar").read_bytes() == (large / info.name).read_bytes()


def test_two_processes_that_want_one_shard_at_once_both_get_it(root, large, serve, tmp_path):
    web, cache = serve(large), tmp_path / "cache"
    web.delay_s = 0.005
    both = [fetch(root, web.url, cache) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=100)
        assert (process.returncode, json.loads(out)) == (0, "a"), err
    assert sorted(p.suffix for p in cache.iterdir()) == [".idx", ".tar"]
    assert 1 <= web.count(".tar") <= 2


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "through_a_cache"), [(0, False), (2, False), (0, True)])
def test_the_loaders_memory_is_flat_over_hundreds_of_epochs(root, folder, serve, tmp_path, workers, through_a_cache):
    """27 samples: 1,500 batches of 32 are 1,777 epochs. Growth is read from the second half, by a straight line."""
    remote = {"cache": str(tmp_path / "cache")} if through_a_cache else {}
    url = serve(folder).url if through_a_cache else str(folder)
    job = {"folder": url, "workers": workers, "batches": int(os.environ.get("SOAK_BATCHES", "1500")), "remote": remote}
    command = [sys.executable, str(SCRIPT.with_name("soak_rank.py")), json.dumps(job)]
    done = subprocess.run(command, env=environment(root), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    numbers, memory = np.asarray(json.loads(done.stdout)).T
    late = numbers >= numbers[-1] / 2
    growth = np.polyfit(numbers[late], memory[late], 1)[0] * np.ptp(numbers[late])
    assert growth < 4e6, f"{growth / 1e6:.1f} MB over {np.ptp(numbers[late])} batches: {memory.tolist()}"


@pytest.fixture(scope="module")
def s3(folder):
    """The folder in a bucket of a local S3 server; its address."""
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    names = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    names["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="derm")
        for path in folder.iterdir():
            client.upload_file(str(path), "derm", f"sets/one/{path.name}")
        yield client
    server.stop()


def test_a_bucket_gives_the_local_samples_in_byte_ranges_and_through_a_cache(folder, s3, tmp_path):
    local = Manifest.load(folder)
    expected = [ShardReader(folder, local.shards).read(s, r) for s, size in enumerate(SIZES) for r in range(size)]
    for remote in (Remote(attempts=2), Remote(cache=str(tmp_path / "cache"), attempts=2)):
        manifest = Manifest.load("s3://derm/sets/one", remote)
        assert manifest.fingerprint == local.fingerprint
        reader = ShardReader(manifest.folder, manifest.shards, remote)
        places = [(s, r) for s, size in enumerate(SIZES) for r in range(size)]
        assert [read() for read in reader.reads(places)] == expected


def test_workers_read_byte_ranges_of_a_bucket_as_they_read_the_folder(root, alone, s3):
    assert stream(root, "s3://derm/sets/one", world=1, workers=2, remote={}) == alone


def test_what_a_bucket_lacks_is_one_line(s3, tmp_path):
    with pytest.raises(ShardError, match=r"s3://derm/sets/two/manifest\.json: there is no such file \(404\)"):
        Manifest.load("s3://derm/sets/two", Remote(attempts=2))
    with pytest.raises(ShardError, match=r"s3://nowhere/x/manifest\.json: there is no such file"):
        Manifest.load("s3://nowhere/x", Remote(attempts=2))
    held = s3.get_object(Bucket="derm", Key="sets/one/train-00001.tar")["Body"].read()
    try:
        s3.put_object(Bucket="derm", Key="sets/one/train-00001.tar", Body=held[:-1024])
        with pytest.raises(ShardError, match=r"s3://derm/sets/one/train-00001\.tar: has .* it is truncated"):
            Manifest.load("s3://derm/sets/one", Remote(attempts=2))
        s3.delete_object(Bucket="derm", Key="sets/one/train-00001.tar")
        with pytest.raises(ShardError, match=r"s3://derm/sets/one/train-00001\.tar: missing"):
            Manifest.load("s3://derm/sets/one", Remote(attempts=2))
    finally:
        s3.put_object(Bucket="derm", Key="sets/one/train-00001.tar", Body=held)
