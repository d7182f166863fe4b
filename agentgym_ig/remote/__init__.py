"""Models that live behind an OpenAI-compatible server: as policy, as judge of answers, and for beliefs in them."""

from agentgym_ig.remote.judge import Judge
from agentgym_ig.remote.policy import OpenAIPolicy
from agentgym_ig.remote.scorer import ServerScorer
from agentgym_ig.remote.server import OpenAIServer

__all__ = ["Judge", "OpenAIPolicy", "OpenAIServer", "ServerScorer"]
