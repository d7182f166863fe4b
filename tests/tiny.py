"""Small real models for the tests: the shipped policy, and untrained ones of several families."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from agentgym_ig.envs import SearchVectorEnv, Start, rollout, tinywiki_index, tinywiki_questions
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.tinywiki import World
from agentgym_ig.trainers.tinywiki import WARM_START, load_policy_model, tiny_policy
from agentgym_ig.types import Trajectory

FAMILIES = ("qwen3", "qwen2", "llama", "gemma2", "gemma3_text")


@cache
def untrained(family: str, window: int | None = None, kernel: str | None = None) -> Any:
    """A random model of a family in float32, spread out enough that its choices differ.

    window: of its sliding layers, where the family has any. kernel: its attention implementation.
    """
    size: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        "max_position_embeddings": 2048,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "qwen3":
            return tiny_model(0).eval()
        if family == "qwen2":
            size.pop("head_dim")
        if family in ("qwen2", "gemma3_text"):
            size["layer_types"] = ["full_attention", "sliding_attention" if window else "full_attention"]
        if family == "granite":
            size["logits_scaling"] = 4.0
        if window:
            size |= {"sliding_window": window, "use_sliding_window": True}
        config = AutoConfig.for_model(family, **size)
        return AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval()


@cache
def shipped_policy() -> TransformersPolicy:
    """The warm start that the package brings."""
    return tiny_policy(*load_policy_model(WARM_START))


@cache
def tiny_env(num_envs: int = 16) -> SearchVectorEnv:
    """Two- and three-hop questions over a small training world."""
    world = World(77, "train")
    questions = [question for name in ("hop2", "hop3") for question in tinywiki_questions(world, name, 20)]
    return SearchVectorEnv(tinywiki_index(world), questions, num_envs, TINYWIKI_RULES)


def play(count: int = 16, policy: TransformersPolicy | None = None) -> list[Trajectory]:
    """Episodes of the shipped policy, four of each question."""
    env = tiny_env()
    ids = list(env.questions)
    starts = [Start(ids[number // 4], number // 4, number) for number in range(count)]
    return rollout(env, policy or shipped_policy(), starts)
