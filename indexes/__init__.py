"""Indexes: anything with `search(queries, k)`."""

from agentgym_ig.indexes.base import Index
from agentgym_ig.indexes.bm25 import Bm25Index, Bm25Settings
from agentgym_ig.indexes.corpus import PassageStore, read_corpus, read_questions, write_corpus

__all__ = ["Bm25Index", "Bm25Settings", "Index", "PassageStore", "read_corpus", "read_questions", "write_corpus"]
