"""Generation: what a policy makes of its engine's tokens per second, and what is kept from turn to turn brings.

    python -m benchmarks.engines --out benchmarks/results/engines.json
    python -m benchmarks.engines --device cuda

- rollout_over_engine: tokens/s of `TransformersPolicy` (own random numbers for every conversation, stop strings, exact
  log-probabilities) over those of bare `model.generate(do_sample=True)`, on the same prompts, each writing all its
  tokens; the goal is 0.90. `continuous_over_engine` is that of `ContinuousPolicy`.
- reuse: seconds of whole episodes with the keys and values kept from turn to turn, and without. Prompts of about 200
  tokens, then actions of `NEW` and replies of about 300.

Models: the shipped policy, and a random Qwen2 of 10 million parameters with a vocabulary of 151,936. Prompts are random
words of unequal number. All in one process, in turns; one thread unless --threads says otherwise. Not yet measured on
a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from agentgym_ig.commands.console import console
from agentgym_ig.lm.continuous import ContinuousPolicy
from agentgym_ig.lm.policy import LocalPolicy, TransformersPolicy
from agentgym_ig.lm.tiny import tiny_tokenizer
from agentgym_ig.policies import session_of
from agentgym_ig.records import write_json
from agentgym_ig.trainers.tinywiki import WARM_START, load_policy_model
from agentgym_ig.types import Conversation, Message
from benchmarks.measure import side_by_side, where

BATCH, NEW, TURNS = 32, 48, 4
PROMPT, REPLY = (40, 80), (200, 400)


def large_vocabulary() -> Any:
    """A random model of 10 million parameters, nearly all of them in its 151,936 tokens."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=151_936, num_key_value_heads=2, tie_word_embeddings=True, **size))


MODELS: dict[str, Callable[[], Any]] = {
    "shipped": lambda: load_policy_model(WARM_START)[0],
    "large_vocabulary": large_vocabulary,
}


def endless(policy: LocalPolicy) -> LocalPolicy:
    """The policy with actions that end by their length alone, as the bare engine's do here."""
    policy._ends = policy._closing = frozenset()
    if isinstance(policy, ContinuousPolicy):
        policy._stops = [-1]
    return policy


def words(count: int, source: random.Random) -> str:
    """Random words, a token each for the shipped tokenizer."""
    known = [token[1:] for token in tiny_tokenizer().get_vocab() if token.startswith("▁") and token[1:].isalpha()]
    return " ".join(source.choices(sorted(known), k=count))


def conversations(batch: int, length: tuple[int, int] = PROMPT) -> list[Conversation]:
    """Prompts of so many random words, from and to."""
    source = random.Random(0)
    return [Conversation((Message("user", words(source.randint(*length), source)),), seed) for seed in range(batch)]


def played(policy: LocalPolicy, talks: list[Conversation], turns: int, reply: tuple[int, int]) -> list[Conversation]:
    """Conversations with so many actions, and replies of so many random words, from and to, between them."""
    source = random.Random(1)
    with session_of(policy):
        for turn in range(turns):
            if turn:
                talks = [own.plus(Message("tool", words(source.randint(*reply), source))) for own in talks]
            actions = policy(talks)
            talks = [
                own.plus(Message("assistant", action.text, action.token_ids))
                for own, action in zip(talks, actions, strict=True)
                if action is not None
            ]
    return talks


def bare(model: Any, contexts: list[list[int]], new: int) -> Callable[[], Any]:
    """The engine alone: padded prompts to sampled tokens."""
    width = max(map(len, contexts))
    ids = torch.tensor([[0] * (width - len(own)) + own for own in contexts], device=model.device)
    mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in contexts], device=model.device)
    config = GenerationConfig(max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None)
    model.generation_config = GenerationConfig()
    return lambda: model.generate(input_ids=ids, attention_mask=mask, generation_config=config)


def engines(model: Any, batch: int, new: int, *, continuous: bool) -> dict[str, float]:
    """Tokens per second of each, and their ratios to the bare engine."""
    tokenizer, talks = tiny_tokenizer(), conversations(batch)
    policies: dict[str, LocalPolicy] = {"rollout": TransformersPolicy(model, tokenizer, max_new_tokens=new)}
    if continuous:
        policies["continuous"] = ContinuousPolicy(model, tokenizer, max_new_tokens=new, max_cached_tokens=32_768)
    contexts = [policies["rollout"].encoder.encode(own).ids for own in talks]
    functions: dict[str, Callable[[], Any]] = {"engine": bare(model, contexts, new)}
    functions |= {name: partial(endless(own), talks) for name, own in policies.items()}
    with ExitStack() as stack:
        for own in policies.values():
            stack.enter_context(session_of(own))
        speeds = {name: batch * new / seconds for name, seconds in side_by_side(functions).items()}
    figures = {f"{name}_tokens_per_s": round(speed) for name, speed in speeds.items()}
    return figures | {f"{name}_over_engine": round(speeds[name] / speeds["engine"], 3) for name in policies}


def reuse(model: Any, batch: int, new: int) -> dict[str, float]:
    """Seconds of `TURNS` turns of all episodes, with keys and values kept and without."""

    def episodes(cached: int) -> None:
        policy = TransformersPolicy(model, tiny_tokenizer(), max_new_tokens=new, max_cached_tokens=cached)
        played(endless(policy), conversations(batch), TURNS, REPLY)

    times = side_by_side({"kept": lambda: episodes(1_000_000), "anew": lambda: episodes(0)}, rounds=3)
    return {f"{name}_s": round(seconds, 3) for name, seconds in times.items()} | {
        "kept_over_anew": round(times["anew"] / times["kept"], 3)
    }


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Conversations at once.")] = BATCH,
    new: Annotated[int, typer.Option(help="Tokens of an action.")] = NEW,
    only: Annotated[list[str] | None, typer.Option(help="shipped, large_vocabulary; both by default.")] = None,
    threads: Annotated[int, typer.Option(help="Of torch, on a CPU.")] = 1,
    continuous: Annotated[bool, typer.Option(help="Also time continuous batching.")] = True,
) -> None:
    """Run everything and print it as JSON."""
    torch.set_num_threads(threads)
    figures: dict[str, Any] = where() | {"device": device, "batch": batch, "new_tokens": new, "threads": threads}
    for name in only or MODELS:
        model = MODELS[name]().to(device).eval()
        figures[name] = engines(model, batch, new, continuous=continuous)
        figures[name]["reuse"] = reuse(model, batch, new)
    figures["rollout_over_engine"] = min(figures[name]["rollout_over_engine"] for name in only or MODELS)
    console.print_json(data=figures)
    if out is not None:
        write_json(out, figures)


if __name__ == "__main__":
    typer.run(main)
