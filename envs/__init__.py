"""Gymnasium environments for multi-turn search, their reward wrappers, rollouts and evaluation.

Registered: `agentgym_ig/TinyWiki-v0` needs nothing; `agentgym_ig/Search-v0` takes `index` and `questions`.
"""

import gymnasium

from agentgym_ig.envs.episode import Episode, Rules
from agentgym_ig.envs.evaluate import SUITES, Evaluation, Suite, evaluate
from agentgym_ig.envs.info_gain import InfoGain, VectorInfoGain
from agentgym_ig.envs.rollout import Start, prompts_of, rollout
from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv
from agentgym_ig.envs.tinywiki import tinywiki_index, tinywiki_questions

__all__ = [
    "SUITES",
    "Episode",
    "Evaluation",
    "InfoGain",
    "Rules",
    "SearchEnv",
    "SearchVectorEnv",
    "Start",
    "Suite",
    "VectorInfoGain",
    "evaluate",
    "prompts_of",
    "rollout",
    "tinywiki_index",
    "tinywiki_questions",
]

gymnasium.register(
    "agentgym_ig/Search-v0",
    entry_point="agentgym_ig.envs.search:SearchEnv",
    vector_entry_point="agentgym_ig.envs.search:SearchVectorEnv",
    disable_env_checker=True,
    order_enforce=False,
)
gymnasium.register(
    "agentgym_ig/TinyWiki-v0",
    entry_point="agentgym_ig.envs.tinywiki:tiny_env",
    vector_entry_point="agentgym_ig.envs.tinywiki:tiny_vector_env",
    disable_env_checker=True,
    order_enforce=False,
)
