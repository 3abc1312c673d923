"""How jobs read shards at a URL (`shards: s3://bucket/folder`): through a `cache` of whole shards or in byte ranges."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from dermfm.config import check_range, key
from shards.storage import Remote


@dataclass(kw_only=True)
class CacheConfig:
    """How shards at a URL (s3, gs, http, https) are read. Local folders of shards need none of it."""

    folder: str | None = key(
        None, "folder on the node's own disk that keeps whole shards; null: byte ranges of samples"
    )
    max_bytes: int = key(200_000_000_000, "bytes of that folder; the shards used least recently make room")
    timeout_s: float = key(60.0, "seconds without a byte after which a request counts as failed")
    attempts: int = key(6, "how often a request is made in all before the job ends with one line")

    def __post_init__(self) -> None:
        check_range("max_bytes", self.max_bytes, 1)
        check_range("timeout_s", self.timeout_s, 0.1)
        check_range("attempts", self.attempts, 1, 100)


def remote(config: CacheConfig) -> Remote:
    """The same for `shards`."""
    values = asdict(config)
    return Remote(cache=values.pop("folder"), **values)
