"""Files at a URL (s3, gs, http, https) through fsspec: whole or in byte ranges, with bounded retries and a clear line.

Credentials and endpoints come from where each storage looks for them: `AWS_…` variables and ~/.aws for s3, Google's
default credentials for gs, `HTTPS_PROXY` for http.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shards.index import ShardError

T = TypeVar("T")
SLOWEST = 100_000  # bytes a second; an answer slower than this on the whole is given up and asked for again
LONGEST_PAUSE_S = 16.0
REQUESTS = 16  # questions after sizes that are under way at a time
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
PACKAGES = {"s3": "pip install 'dermfm[s3]'", "gs": "pip install 'dermfm[gs]'", "http": "pip install aiohttp"}
_log = logging.getLogger(__name__)


class StorageError(ShardError):
    """A storage does not give what it should, after all attempts. Not the fault of one sample: it ends the job."""


@dataclass(frozen=True)
class Remote:
    """How shards at a URL are read.

    `cache`: folder on the node's disk for whole shards, of at most `max_bytes`; None: byte ranges of single samples.
    `timeout_s`: seconds without a byte until a request counts as failed; `attempts`: how often it is made in all, with
    pauses that double from `pause_s` seconds to 16.
    """

    cache: str | None = None
    max_bytes: int = 200_000_000_000
    timeout_s: float = 60.0
    attempts: int = 6
    pause_s: float = 0.5


def is_remote(folder: str | Path) -> bool:
    """Whether a folder of shards is a URL. (A Path never is: it would have lost one of the slashes.)"""
    return isinstance(folder, str) and "://" in folder


def check_local(folder: str, what: str) -> None:
    """ShardError where shards are to be written to a URL."""
    if is_remote(folder):
        raise ShardError(f"{what}: '{folder}' is a URL; shards are written to a local folder and copied from there")


class Storage:
    """The files of one remote folder. Opened lazily; an object belongs to the process that uses it first."""

    def __init__(self, folder: str, remote: Remote) -> None:
        self.folder = folder.rstrip("/")
        self.remote = remote
        self._fs: Any = None

    def url(self, name: str) -> str:
        """Where a file lies."""
        return f"{self.folder}/{name}"

    def read(self, name: str) -> bytes:
        """A whole (small) file; StorageError where it cannot be had."""
        return self._retried(name, lambda: self._bytes(name, None, 10 * self.remote.timeout_s))

    def read_range(self, name: str, start: int, size: int, total: int) -> bytes:
        """`size` bytes from `start` of a file of `total` bytes. From byte 0, more than was asked for may come: the
        whole file, by a server that does not know byte ranges. StorageError where anything else comes."""

        def ask() -> bytes:
            data = self._bytes(name, (start, start + size), self.remote.timeout_s + size / SLOWEST)
            if len(data) == total and start + size != total and start == 0:
                return data
            if len(data) == size:
                return data
            if len(data) == total:
                raise StorageError(
                    f"{self.url(name)}: the server sends the whole file where a byte range is asked for; "
                    "give cache.folder, so that whole shards are kept"
                )
            raise OSError(f"{len(data)} bytes came, {size} were asked for from byte {start} of {total}")

        return self._retried(name, ask)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of each file, None where the storage does not tell; StorageError for the first that is missing.

        One listing where the storage can list; over http one question a file.
        """
        if self.folder.startswith("http"):
            with ThreadPoolExecutor(REQUESTS, thread_name_prefix="sizes") as pool:
                return list(pool.map(lambda name: self._retried(name, lambda: self._size(name)), names))
        listed = self._retried("", lambda: self._filesystem().ls(self.folder, detail=True, refresh=True))
        found = {entry["name"].rpartition("/")[2]: entry["size"] for entry in listed}
        for name in names:
            if name not in found:
                raise StorageError(f"{self.url(name)}: missing, though the manifest needs it; copy it anew")
        return [found[name] for name in names]

    def _bytes(self, name: str, span: tuple[int, int] | None, deadline_s: float) -> bytes:
        import fsspec.asyn

        fs = self._filesystem()
        start, end = span or (None, None)
        if not fs.async_impl:
            return bytes(fs.cat_file(self.url(name), start=start, end=end))

        async def within_deadline() -> bytes:
            return await asyncio.wait_for(fs._cat_file(self.url(name), start=start, end=end), deadline_s)

        return bytes(fsspec.asyn.sync(fs.loop, within_deadline))

    def _size(self, name: str) -> int | None:
        try:
            return self._filesystem().info(self.url(name))["size"]
        except FileNotFoundError as error:
            # fsspec says "not found" of everything that goes wrong here; the cause knows better
            if error.__cause__ is None or _status(error.__cause__) == 404:
                raise
            raise error.__cause__ from None

    def _retried(self, name: str, work: Callable[[], T]) -> T:
        """What `work` gives; after `attempts` failures, or one that another attempt cannot mend, a StorageError."""
        where = self.url(name) if name else self.folder
        attempts = self.remote.attempts
        for attempt in range(1, attempts + 1):
            try:
                return work()
            except StorageError:
                raise
            except MISSING:
                raise StorageError(f"{where}: there is no such file (404); copy it anew or mend the address") from None
            except PermissionError as error:
                raise StorageError(f"{where}: access is denied ({_reason(error)}); see the credentials") from error
            except Exception as error:  # whatever a network can do; `attempts` bounds it
                status = _status(error)
                if status in (401, 403):
                    raise StorageError(f"{where}: access is denied ({status}); see the credentials") from error
                if attempt == attempts or (status and 400 <= status < 500 and status not in (408, 425, 429)):
                    tries = f"{attempt} attempts" if attempt > 1 else "1 attempt"
                    raise StorageError(f"{where}: cannot be read after {tries} ({_reason(error)})") from error
                _log.info("%s: attempt %d failed (%s)", where, attempt, _reason(error))
                pause = min(self.remote.pause_s * 2 ** (attempt - 1), LONGEST_PAUSE_S)
                time.sleep(pause * random.uniform(0.5, 1.0))  # ranks that failed together must not come back together
        raise AssertionError("the loop above returns or raises")

    def _filesystem(self) -> Any:
        if self._fs is None:
            import fsspec

            scheme = self.folder.partition("://")[0]
            try:
                self._fs = fsspec.filesystem(scheme, skip_instance_cache=True, **_options(scheme, self.remote))
                _without_retries(self._fs)
            except ImportError as error:
                remedy = PACKAGES.get("http" if scheme == "https" else scheme, f"install what fsspec needs ({error})")
                raise StorageError(f"{self.folder}: no package here reads {scheme}://; {remedy}") from error
            except ValueError as error:
                raise StorageError(f"{self.folder}: '{scheme}' is no known storage; s3, gs, http, https are") from error
        return self._fs


def _options(scheme: str, remote: Remote) -> dict[str, Any]:
    """What fsspec's implementation of a storage needs so that only our own attempts and time limits count."""
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=remote.timeout_s, sock_read=remote.timeout_s)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    if scheme in ("s3", "s3a"):
        times = {"connect_timeout": remote.timeout_s, "read_timeout": remote.timeout_s}
        pool = {"max_pool_connections": 2 * REQUESTS}
        return {"config_kwargs": {**times, **pool, "retries": {"total_max_attempts": 1}}}
    return {}


def _without_retries(fs: Any) -> None:
    """Only our own attempts count: s3fs would multiply them by five, gcsfs by six, with half a minute of pauses."""
    fs.retries = 1
    once = getattr(getattr(type(fs), "_request", None), "__wrapped__", None)
    if "gs" in fs.protocol and once is not None:
        fs._request = types.MethodType(once, fs)


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error tells of, itself or by its cause."""
    for one in (error, error.__cause__):
        if isinstance(one, OSError) and str(one).startswith("Forbidden: "):
            return 403  # all that gcsfs says of it
        status = getattr(one, "status", None)
        if status is None and type(one).__module__.startswith("gcsfs."):
            status = getattr(one, "code", None)  # aiohttp has a `code`, too: 400 for an answer that was cut
        if status is None:
            status = (getattr(one, "response", None) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status
    return None


def _reason(error: BaseException) -> str:
    """One line on an error; its type where it has no text (timeouts)."""
    text = " ".join(str(error).split())[:200]
    kind = "no answer in time" if isinstance(error, TimeoutError | asyncio.TimeoutError) else type(error).__name__
    return text or kind
