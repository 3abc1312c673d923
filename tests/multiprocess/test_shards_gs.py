"""Shards in a Google bucket: gcsfs against the emulator of its storage API, and against a server that only fails."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from shards.manifest import Manifest, ShardError
from shards.reader import ShardReader
from shards.storage import Remote, Storage, StorageError

SIZES = [5, 3]
PLACES = [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(find_spec("gcsfs") is None, reason="needs the package gcsfs"),
]


@pytest.fixture(autouse=True)
def no_search_for_credentials(monkeypatch):
    """Without these, gcsfs asks a server that only Google's own machines have, for half a minute."""
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nonexistent")


@pytest.fixture
def bucket(write_shards, tmp_path_factory, monkeypatch) -> Iterator[tuple[Manifest, str]]:
    """A local folder of shards, and the address of the emulator that has the same files in the bucket `derm`."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    local = Manifest.load(write_shards(tmp_path_factory.mktemp("shards"), SIZES, sample_of))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="derm")
    server.start()
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    try:
        for name in [s.name for s in local.shards] + [s.name.replace(".tar", ".idx") for s in local.shards]:
            upload(address, name, local.file(name))
        upload(address, "manifest.json", local.file("manifest.json"))
        yield local, address
    finally:
        server.stop()


def sample_of(number: int) -> dict[str, str | bytes]:
    return {"__key__": f"r{number}", "jpg": bytes([number]) * (2000 + number)}


def upload(address: str, name: str, data: bytes) -> None:
    url = f"{address}/upload/storage/v1/b/derm/o?uploadType=media&name={quote('sets/one/' + name, safe='')}"
    with urlopen(Request(url, data=data, headers={"Content-Type": "application/octet-stream"}), timeout=60) as answer:
        answer.read()


def test_a_google_bucket_gives_the_local_samples_in_byte_ranges_and_through_a_cache(bucket, tmp_path):
    local, _ = bucket
    own = ShardReader(local.folder, local.shards)
    for remote in (Remote(attempts=2), Remote(cache=str(tmp_path / "cache"), attempts=2)):
        manifest = Manifest.load("gs://derm/sets/one", remote)
        assert manifest.fingerprint == local.fingerprint
        reader = ShardReader(manifest.folder, manifest.shards, remote)
        assert [read() for read in reader.reads(PLACES)] == [own.read(*place) for place in PLACES]


def test_what_a_google_bucket_lacks_is_one_line(bucket):
    local, address = bucket
    with pytest.raises(ShardError, match=r"gs://derm/sets/two/manifest\.json: there is no such file \(404\)"):
        Manifest.load("gs://derm/sets/two", Remote(attempts=2))
    name = local.shards[1].name
    upload(address, name, local.file(name)[:-1024])
    with pytest.raises(ShardError, match=rf"gs://derm/sets/one/{name}: has .* it is truncated"):
        Manifest.load("gs://derm/sets/one", Remote(attempts=2))


@pytest.mark.parametrize(
    ("status", "requests", "message"),
    [(503, 3, "cannot be read after 3 attempts"), (403, 1, "access is denied"), (401, 1, "access is denied")],
)
def test_a_google_bucket_that_fails_is_asked_as_often_as_was_said(monkeypatch, status, requests, message):
    asked = []

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            """Tests' output stays clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        with pytest.raises(StorageError, match=message) as caught:
            Storage("gs://derm/sets/one", Remote(attempts=3, pause_s=0.01)).read("manifest.json")
    finally:
        server.shutdown()
        server.server_close()
    assert len([path for path in asked if "manifest.json" in path]) == requests
    assert "\n" not in str(caught.value)
