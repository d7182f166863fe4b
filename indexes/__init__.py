"""Indexes: anything with `search(queries, k)`."""

from agentgym_ig.data.questions import read_questions
from agentgym_ig.indexes.base import Index, StoredIndex
from agentgym_ig.indexes.bm25 import Bm25Index, Bm25Settings
from agentgym_ig.indexes.build import BuildOptions, build_index
from agentgym_ig.indexes.cache import CachedIndex
from agentgym_ig.indexes.http import HttpIndex
from agentgym_ig.indexes.hybrid import HybridIndex
from agentgym_ig.indexes.opening import open_index, open_indexes
from agentgym_ig.indexes.sources import read_corpus
from agentgym_ig.indexes.splitting import split_index
from agentgym_ig.indexes.store import PassageStore, write_corpus

__all__ = [
    "Bm25Index",
    "Bm25Settings",
    "BuildOptions",
    "CachedIndex",
    "HttpIndex",
    "HybridIndex",
    "Index",
    "PassageStore",
    "StoredIndex",
    "build_index",
    "open_index",
    "open_indexes",
    "read_corpus",
    "read_questions",
    "split_index",
    "write_corpus",
]
