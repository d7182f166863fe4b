"""Question sets and corpora: from their releases to files that the indexes and environments read."""

from agentgym_ig.data.manifest import read_manifest
from agentgym_ig.data.questions import read_questions

__all__ = ["read_manifest", "read_questions"]
