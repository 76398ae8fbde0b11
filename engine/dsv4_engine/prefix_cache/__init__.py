"""The on-disk store of shared prefixes: content-addressed segments of a sequence's state.

`keys` names segments; `store` keeps bytes under these names (`objects` the files, `folder` where they lie, `index` what
is known about them, `eviction` what goes first) and knows no tensor.  Importing this package imports no torch.
"""

from .keys import Key, Origin, Segment, chain_key, root_key, segments
from .store import Found, Kind, Miss, PrefixStore

__all__ = ["Found", "Key", "Kind", "Miss", "Origin", "PrefixStore", "Segment", "chain_key", "root_key", "segments"]
