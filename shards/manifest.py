"""placeholder until the manifest lands"""


class ShardError(ValueError):
    """A shard, index or manifest cannot be used; one line that names it."""
