"""A folder on the node's own disk that holds whole shards of a remote storage, shared by all processes of the node.

No locks: a shard is written under a temporary name of its own, checked against size and sha256, and renamed, so that
whatever has its final name is whole, and a process that is killed leaves nothing but a temporary file. Who finds the
fresh temporary file of another waits for that one; a file that no longer grows counts for nothing. Names are sha256
sums, so that several sets of shards share one folder. The files that were used least recently make room.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import shutil
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from shards.index import ShardError, ShardIndex, index_path
from shards.storage import Remote, Storage, StorageError

if TYPE_CHECKING:
    from shards.manifest import ShardInfo

CHUNK = 16 << 20  # bytes of one request; each is retried by itself
STREAMS = 4  # requests of one shard that are under way at a time
POLL_S = 0.05
RECENT_S = 60.0  # what was used within this time is not removed for a shard that is fetched ahead
TOUCH_S = 5.0  # the time of last use is noted this often
ROUNDS = 8  # how often a shard may be removed by others between its arrival and its use
_log = logging.getLogger(__name__)


class NodeCache:
    """Bytes and indexes of shards through a folder of whole shards. An object belongs to one process."""

    concurrent = False  # reading is local: nothing is won by asking for several samples at a time

    def __init__(self, storage: Storage) -> None:
        assert storage.remote.cache is not None
        self.storage = storage
        self.folder = Path(storage.remote.cache)
        self._touched: dict[Path, float] = {}
        self._warned = False
        self._wanted: queue.SimpleQueue[list[ShardInfo] | None] | None = None

    def read(self, shard: ShardInfo, start: int, size: int) -> bytes:
        """`size` bytes of the tar from `start`. The file is opened each time: one that is held open frees no space."""
        path = self.path(shard)
        for _ in range(ROUNDS):
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self.fetch(shard)
                continue
            try:
                self._touch(path)
                return os.pread(file, size, start)
            finally:
                os.close(file)
        raise StorageError(
            f"cache.max_bytes: {self.storage.remote.max_bytes} bytes are too few; {shard.name} was removed from "
            f"{self.folder} {ROUNDS} times before it could be read"
        )

    def index(self, shard: ShardInfo) -> ShardIndex:
        """The index of a shard, mapped from the folder."""
        path = index_path(self.path(shard))
        with contextlib.suppress(FileNotFoundError, ShardError):  # removed in between, or damaged: fetched anew
            os.utime(path)
            return ShardIndex(path)
        index = remote_index(self.storage, shard)  # checked before it gets its name
        part = _part_of(path)
        part.write_bytes(index.content())
        os.replace(part, path)
        return index

    def path(self, shard: ShardInfo) -> Path:
        """Where the tar of a shard lies once it is here."""
        return self.folder / f"{shard.sha256}.tar"

    def fetch(self, shard: ShardInfo, ahead: bool = False) -> None:
        """Have the shard in the folder; StorageError where it cannot be had.

        `ahead`: it is not needed yet; nothing is waited for, and nothing recently used is removed for it.
        """
        try:
            self._fetch(shard, self.path(shard), ahead)
        except OSError as error:  # of this node's disk: a StorageError, as it is not the fault of a sample
            raise StorageError(f"cache.folder: {self.folder} cannot hold {shard.name} ({error.strerror})") from error

    def _fetch(self, shard: ShardInfo, path: Path, ahead: bool) -> None:
        while not path.exists():
            if _fresh_parts(path, self.storage.remote):
                if ahead:
                    return
                time.sleep(POLL_S)
                continue
            if not self._download(shard, path, ahead) and ahead:
                return

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Fetch these shards in the background, in this order, in place of what was asked for before."""
        if self._wanted is None:
            self._wanted = queue.SimpleQueue()
            weakref.finalize(self, self._wanted.put, None)
            arguments = (weakref.ref(self), self._wanted)
            # a daemon: a process that has to end does not wait for shards that it will not read
            threading.Thread(target=_fetch_ahead, args=arguments, daemon=True, name="shards-ahead").start()
        self._wanted.put(list(shards))

    def _download(self, shard: ShardInfo, path: Path, ahead: bool) -> bool:
        """Fetch under a name of one's own and rename; False where another process or the lack of room prevented it."""
        part = _part_of(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "xb") as file:
                file.truncate(shard.num_bytes)  # so that the others see how much will come
                if min(_fresh_parts(path, self.storage.remote), default=part) != part:
                    return False  # another began at the same moment; the first by name goes on
                if not self._make_room(shard, ahead):
                    return False
                download(self.storage, shard, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except FileNotFoundError:
            return False  # it stood still for so long that another process took it for dead
        finally:
            part.unlink(missing_ok=True)
        return True

    def _make_room(self, shard: ShardInfo, ahead: bool) -> bool:
        """Remove the files used least recently until a new shard, whose part file is counted already, fits."""
        files = _listing(self.folder, self.storage.remote)
        total = sum(size for _, size, _ in files)
        limit, now = self.storage.remote.max_bytes, time.time()
        for used, size, path in sorted(files):
            free = shutil.disk_usage(self.folder).free
            if total <= limit and free > shard.num_bytes:
                return True
            if path.suffix == ".part":
                continue
            if now - used < RECENT_S:
                if ahead:
                    return False
                self._warn(shard)
            path.unlink(missing_ok=True)
            total -= size
        if shutil.disk_usage(self.folder).free <= shard.num_bytes:
            raise StorageError(f"cache.folder: no space for {shard.name} ({shard.num_bytes} bytes) on {self.folder}")
        return total <= limit or not ahead

    def _warn(self, shard: ShardInfo) -> None:
        if not self._warned:
            self._warned = True
            limit = self.storage.remote.max_bytes
            _log.warning("cache.max_bytes: %d hold fewer shards than are read at a time (%s)", limit, shard.name)

    def _touch(self, path: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(path, -TOUCH_S) >= TOUCH_S:
            self._touched[path] = now
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)


def check_cache(remote: Remote, shards: Sequence[ShardInfo]) -> None:
    """Make the cache folder; StorageError where it cannot be written or cannot hold the largest shard."""
    if remote.cache is None:
        return
    try:
        os.makedirs(remote.cache, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cache.folder: {remote.cache} cannot be made ({error.strerror})") from error
    if not os.access(remote.cache, os.W_OK | os.X_OK):
        raise StorageError(f"cache.folder: {remote.cache} cannot be written")
    largest = max(shards, key=lambda s: s.num_bytes, default=None)
    if largest is not None and largest.num_bytes > remote.max_bytes:
        raise StorageError(
            f"cache.max_bytes: {remote.max_bytes} is less than the shard {largest.name}; at least {largest.num_bytes}"
        )


def download(storage: Storage, shard: ShardInfo, file: BinaryIO) -> None:
    """Write the tar of a shard to an open binary file, checked; StorageError where other bytes come, twice."""
    for last in (False, True):
        digest, num_bytes = hashlib.sha256(), 0
        file.seek(0)
        for data in _chunks(storage, shard):
            digest.update(data)
            num_bytes += len(data)
            file.write(data)
            file.flush()
        if (digest.hexdigest(), num_bytes) == (shard.sha256, shard.num_bytes):
            return
        if last:
            raise StorageError(
                f"{storage.url(shard.name)}: {num_bytes} bytes came that are not those of the manifest "
                f"({shard.num_bytes} bytes, sha256 {shard.sha256[:12]}…); copy it anew"
            )


def remote_index(storage: Storage, shard: ShardInfo) -> ShardIndex:
    """The index of a remote shard, in memory; StorageError where it is not that of the manifest's shard."""
    name = index_path(shard.name).name
    index = ShardIndex(storage.url(name), storage.read(name))
    if len(index) != shard.num_samples:
        raise StorageError(f"{index.path}: lists {len(index)} samples, the manifest says {shard.num_samples}")
    return index


def _chunks(storage: Storage, shard: ShardInfo) -> Iterator[bytes]:
    """The bytes of a shard in order, some requests ahead; in one piece where the server knows no byte ranges."""
    total = shard.num_bytes
    first = storage.read_range(shard.name, 0, min(CHUNK, total), total)
    yield first
    starts = range(len(first), total, CHUNK)
    if not starts:
        return
    with ThreadPoolExecutor(STREAMS, thread_name_prefix="shard") as pool:
        for wave in range(0, len(starts), STREAMS):  # wave by wave: memory holds no more than STREAMS chunks
            yield from pool.map(
                lambda start: storage.read_range(shard.name, start, min(CHUNK, total - start), total),
                starts[wave : wave + STREAMS],
            )


def _part_of(path: Path) -> Path:
    """A temporary name that no other process or thread has, telling who writes it."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def _fresh_parts(path: Path, remote: Remote) -> list[Path]:
    """Temporary files of one shard that a living process writes to."""
    return [part for part in path.parent.glob(f"{path.name}.*.part") if _is_fresh(part, remote)]


def _is_fresh(part: Path, remote: Remote) -> bool:
    host, pid, _ = part.name.removesuffix(".part").rsplit("-", 2)
    if host.endswith(f".{socket.gethostname()}") and not _is_alive(int(pid)):
        return False
    with contextlib.suppress(FileNotFoundError):
        return time.time() - part.stat().st_mtime < _patience(remote)
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _patience(remote: Remote) -> float:
    """Seconds without growth after which a temporary file is dead: longer than any single request may take."""
    return 2 * (remote.timeout_s + CHUNK / 1e6)


def _listing(folder: Path, remote: Remote) -> list[tuple[float, int, Path]]:
    """(time of last use, bytes, path) of the cache's files. Dead temporary files are removed on the way."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if path.suffix == ".part" and time.time() - status.st_mtime > _patience(remote):
                path.unlink()
            elif path.suffix in (".tar", ".idx", ".part"):
                found.append((status.st_mtime, status.st_size, path))
    return found


def _fetch_ahead(cache: weakref.ref[NodeCache], wanted: queue.SimpleQueue[list[ShardInfo] | None]) -> None:
    """Work off the newest list of wanted shards; ends with the cache object."""
    shards: list[ShardInfo] = []
    while True:
        newest: list[ShardInfo] | None = shards if shards else wanted.get()
        while not wanted.empty():
            newest = wanted.get()
        alive = cache()
        if newest is None or alive is None:
            return
        shards = newest
        try:
            if shards:
                alive.fetch(shards.pop(0), ahead=True)
        except StorageError as error:
            _log.info("not fetched ahead: %s", error)  # whoever needs the shard meets the fault and tells of it
        except RuntimeError:
            return  # the interpreter is ending
        del alive
