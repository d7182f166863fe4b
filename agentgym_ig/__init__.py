"""agentgym_ig: Gymnasium environments, dense reward channels and trainers for LLM search agents.

Importing this package is cheap; the parts are `agentgym_ig.indexes`, `agentgym_ig.envs`, `agentgym_ig.trainers`
and, for language-model policies, `agentgym_ig.lm`.
"""

from agentgym_ig.answers import METRICS, score
from agentgym_ig.baselines import closed_book, multi_hop, retrieve_once
from agentgym_ig.belief import combine_aliases, information_gains, with_belief
from agentgym_ig.errors import AgentGymError, BuildFailed, CheckpointError, CorpusError, IndexUnusable, SearchFailed
from agentgym_ig.policies import Policy, RandomPolicy, ScriptedPolicy, oracle
from agentgym_ig.types import Action, Conversation, Hit, Message, Passage, Question, Stop, Trajectory, Turn

__version__ = "0.1.0"

__all__ = [
    "METRICS",
    "Action",
    "AgentGymError",
    "BuildFailed",
    "CheckpointError",
    "Conversation",
    "CorpusError",
    "Hit",
    "IndexUnusable",
    "Message",
    "Passage",
    "Policy",
    "Question",
    "RandomPolicy",
    "ScriptedPolicy",
    "SearchFailed",
    "Stop",
    "Trajectory",
    "Turn",
    "closed_book",
    "combine_aliases",
    "information_gains",
    "multi_hop",
    "oracle",
    "retrieve_once",
    "score",
    "with_belief",
]
