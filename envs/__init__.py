"""Gymnasium environments for multi-turn search, their reward channels, rollouts and evaluation.

Registered: `agentgym_ig/TinyWiki-v0` and `agentgym_ig/MiniWiki-v0` need nothing; `agentgym_ig/Search-v0`, and one id
for each dataset (`agentgym_ig/HotpotQA-v0`, …), take `index` and `questions`.
"""

import gymnasium

from agentgym_ig.envs.channels import (
    Channel,
    Evidence,
    Format,
    Judged,
    Outcome,
    RepeatQuery,
    SearchCost,
    SelfGuide,
)
from agentgym_ig.envs.datasets import DATASET_IDS, search_env, search_vector_env
from agentgym_ig.envs.episode import Episode, Rules
from agentgym_ig.envs.evaluate import Evaluation, compare_evaluations, evaluate
from agentgym_ig.envs.info_gain import InfoGain
from agentgym_ig.envs.miniwiki import miniwiki_index, miniwiki_suite
from agentgym_ig.envs.rollout import Start, prompts_of, rollout
from agentgym_ig.envs.search import SearchEnv, SearchVectorEnv
from agentgym_ig.envs.suites import SUITES, Suite, SuiteFile, read_suite, suite_datasets
from agentgym_ig.envs.tinywiki import tinywiki_index, tinywiki_questions
from agentgym_ig.envs.wrappers import ChannelWrapper, VectorChannelWrapper, add_channel

__all__ = [
    "DATASET_IDS",
    "SUITES",
    "Channel",
    "ChannelWrapper",
    "Episode",
    "Evaluation",
    "Evidence",
    "Format",
    "InfoGain",
    "Judged",
    "Outcome",
    "RepeatQuery",
    "Rules",
    "SearchCost",
    "SearchEnv",
    "SearchVectorEnv",
    "SelfGuide",
    "Start",
    "Suite",
    "SuiteFile",
    "VectorChannelWrapper",
    "add_channel",
    "compare_evaluations",
    "evaluate",
    "miniwiki_index",
    "miniwiki_suite",
    "prompts_of",
    "read_suite",
    "rollout",
    "search_env",
    "search_vector_env",
    "suite_datasets",
    "tinywiki_index",
    "tinywiki_questions",
]


def _register(name: str, maker: str, **kwargs: str) -> None:
    # Checker and order enforcer are left out: the environments raise ResetNeeded and check actions themselves.
    gymnasium.register(
        name,
        entry_point=f"agentgym_ig.envs.{maker}_env",
        vector_entry_point=f"agentgym_ig.envs.{maker}_vector_env",
        disable_env_checker=True,
        order_enforce=False,
        kwargs=kwargs,
    )


_register("agentgym_ig/TinyWiki-v0", "tinywiki:tiny")
_register("agentgym_ig/MiniWiki-v0", "miniwiki:mini")
_register("agentgym_ig/Search-v0", "datasets:search")
for _name, _dataset in DATASET_IDS.items():
    _register(_name, "datasets:search", dataset=_dataset)
