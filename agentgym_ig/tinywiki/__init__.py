"""TinyWiki, the generated encyclopedia in which search agents learn on a laptop CPU."""

from agentgym_ig.tinywiki.names import Pool
from agentgym_ig.tinywiki.world import HELD_OUT, RELATIONS, SCHEMA, STOPWORDS, Path, World, chains

__all__ = ["HELD_OUT", "RELATIONS", "SCHEMA", "STOPWORDS", "Path", "Pool", "World", "chains"]
