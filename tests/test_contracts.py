"""Every environment and every wrapper keeps the contracts, and every registered id makes one that does."""

import json
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.vector import VectorEnv

from agentgym_ig import AgentGymError
from agentgym_ig.envs import (
    DATASET_IDS,
    Evidence,
    InfoGain,
    Outcome,
    RepeatQuery,
    Rules,
    SearchCost,
    SearchEnv,
    SearchVectorEnv,
    SelfGuide,
    add_channel,
)
from agentgym_ig.envs.testing import EnvContract, VectorEnvContract
from agentgym_ig.indexes import Bm25Index
from tests.fakes import PASSAGES, QUESTIONS, ListIndex, shown_words

RULES = Rules(max_turns=4, top_k=2, weights={"outcome": 1.0, "format": 0.25})
TOOLS = Rules(prompt="igpo", max_turns=4, top_k=2)


class TestTags(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        return SearchEnv(ListIndex(), QUESTIONS, RULES)


class TestTools(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        return SearchEnv(ListIndex(), QUESTIONS, TOOLS)


class TestTinyWiki(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        return gymnasium.make("agentgym_ig/TinyWiki-v0", per_dataset=20)


class TestBudgets(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        return SearchEnv(ListIndex(), QUESTIONS, Rules(max_turns=4, max_searches=1, max_observation=20))


def wrapped(env: Any) -> Any:
    """Every channel that needs no model, and one that has a made-up one."""
    for channel in (Outcome("cover_em"), SearchCost(), RepeatQuery(), Evidence(), SelfGuide()):
        env = add_channel(env, channel, weight=0.5)
    return add_channel(env, InfoGain(shown_words), weight=lambda: 0.125)


class TestAllChannels(EnvContract):
    def make(self) -> gymnasium.Env[str, str]:
        made: gymnasium.Env[str, str] = wrapped(SearchEnv(ListIndex(), QUESTIONS, RULES))
        return made


class TestVectorTags(VectorEnvContract):
    def make(self, num_envs: int) -> VectorEnv[Any, Any, Any]:
        return SearchVectorEnv(ListIndex(), QUESTIONS, num_envs, RULES)

    def make_single(self) -> gymnasium.Env[str, str]:
        return SearchEnv(ListIndex(), QUESTIONS, RULES)


class TestVectorAllChannels(VectorEnvContract):
    def make(self, num_envs: int) -> VectorEnv[Any, Any, Any]:
        made: VectorEnv[Any, Any, Any] = wrapped(SearchVectorEnv(ListIndex(), QUESTIONS, num_envs, TOOLS))
        return made

    def make_single(self) -> gymnasium.Env[str, str]:
        made: gymnasium.Env[str, str] = wrapped(SearchEnv(ListIndex(), QUESTIONS, TOOLS))
        return made


@pytest.fixture
def toy_index(toy: Path) -> Path:
    Bm25Index.build(PASSAGES, toy / "index")
    return toy / "index"


@pytest.mark.parametrize("name", ["agentgym_ig/Search-v0", *DATASET_IDS])
def test_every_registered_id_is_made_from_paths(name: str, toy: Path, toy_index: Path) -> None:
    dataset = DATASET_IDS.get(name, "hotpotqa")
    (toy / "questions" / f"{dataset}.jsonl").write_text((toy / "questions" / "hotpotqa.jsonl").read_text())
    questions = toy / "questions" / f"{dataset}.jsonl" if name == "agentgym_ig/Search-v0" else toy / "questions"

    class Contract(EnvContract):
        def make(self) -> gymnasium.Env[str, str]:
            return gymnasium.make(name, index=toy_index, questions=questions, rules=RULES)

    Contract().test_gymnasium_accepts_it()
    Contract().test_channels_add_up_to_the_reward()
    vector = gymnasium.make_vec(
        name, num_envs=3, index=toy_index, questions=questions, vectorization_mode="vector_entry_point"
    )
    assert len(vector.reset(seed=0)[0]) == 3


@pytest.mark.parametrize(("mode", "options"), [("sync", {}), ("async", {"shared_memory": False, "context": "spawn"})])
def test_gymnasiums_own_vectors_take_it_too(mode: str, options: dict[str, Any]) -> None:
    vector = gymnasium.make_vec(
        "agentgym_ig/TinyWiki-v0", num_envs=2, vectorization_mode=mode, vector_kwargs=options, per_dataset=5
    )
    prompts, _ = vector.reset(seed=0)
    replies, rewards, *_ = vector.step(("<search>film</search>", "<answer>x</answer>"))
    assert len(prompts) == len(replies) == len(rewards) == 2
    vector.close()


def test_shared_memory_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="shared_memory=False"):
        gymnasium.make_vec("agentgym_ig/TinyWiki-v0", num_envs=2, vectorization_mode="async", per_dataset=5)


def test_paths_that_lead_nowhere_are_named(toy: Path, toy_index: Path) -> None:
    def make(questions: Path, name: str = "agentgym_ig/NQ-v0") -> None:
        gymnasium.make(name, index=toy_index, questions=questions)

    with pytest.raises(AgentGymError, match=r"it holds no nq\.jsonl"):
        make(toy / "questions")
    with pytest.raises(AgentGymError, match="name one of its question files"):
        make(toy / "questions", "agentgym_ig/Search-v0")
    (toy / "empty.jsonl").write_text("")
    with pytest.raises(AgentGymError, match=r"empty\.jsonl holds no question"):
        make(toy / "empty.jsonl")
    blank = {"id": "1", "question": "Who?", "answers": ["", "he"]}
    (toy / "blank.jsonl").write_text(json.dumps(blank))
    made = gymnasium.make("agentgym_ig/NQ-v0", index=toy_index, questions=toy / "blank.jsonl")
    assert made.get_wrapper_attr("questions")["1"].answers == ("he",)
    (toy / "none.jsonl").write_text(json.dumps({"id": "1", "question": "Who?", "answers": []}))
    with pytest.raises(AgentGymError, match=r"none\.jsonl:1: question '1' has no answer"):
        make(toy / "none.jsonl")
    with pytest.raises(AgentGymError, match="no index in"):
        gymnasium.make("agentgym_ig/NQ-v0", index=toy / "nothing", questions=QUESTIONS)
