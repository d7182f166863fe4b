"""Parts of `benchmarks.gpu` that take a language model: rollout, a whole training step, and a run that learns.

Models are made of random numbers in the published shapes of Qwen2.5, so likelihoods are nearly uniform: the error of
bfloat16 that is found here need not be that of a trained model. All is as fast or slow as with trained weights.
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.lm.tiny import tiny_model, tiny_tokenizer
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.trainers import Scorer, TrainConfig, recipe
from agentgym_ig.trainers.adapters import with_lora
from agentgym_ig.trainers.experience import Experience
from agentgym_ig.trainers.footprint import Counts, Sketch
from agentgym_ig.trainers.learner import Learner, make_learner, precision
from agentgym_ig.trainers.liger import with_liger
from agentgym_ig.trainers.loop import Run, train
from agentgym_ig.trainers.plan import GPUS, Job, Plan, plan
from agentgym_ig.trainers.scoring import Scored
from agentgym_ig.trainers.tinywiki import (
    WARM_START,
    load_policy_model,
    tiny_config,
    tiny_policy,
    tiny_recipe,
    training_env,
    training_world,
)
from agentgym_ig.trainers.update import Update
from benchmarks import info_gain as info_gain_ways
from benchmarks.engines import conversations, endless, engines, played
from benchmarks.learning import ASKED, Trial, _evaluation

PEAK = 790e12
"""FLOP/s in bfloat16 that MFU is a share of: the base of the goal of 0.45 for the 1.5B model. Data sheets promise more
(989e12 for an H100 and an H200); the share of that stands beside it.
"""
RANK = 16
"""Of the 7B model's adapter."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much there is to do. A step's episodes have `turns` actions of `new` tokens, and `context` in all."""

    context: int = 8192
    prompt: int = 200
    turns: int = 5
    new: int = 64
    episodes: int = 8
    micro_batch: int = 4
    exact: int = 2
    """Episodes that are read in float32 as well."""
    rounds: int = 2
    """Of what is timed, after one that is not."""
    batch: int = 32
    """Conversations of the rollout part, with actions of `sampled` tokens."""
    sampled: int = 48
    learning_steps: int = 30
    asked: int = ASKED["test"]
    """Questions of each set, before and after the run that learns."""

    @property
    def reply(self) -> int:
        """Tokens of a reply; the tiny tokenizer's chat template puts nothing around it."""
        return (self.context - self.prompt - self.turns * self.new) // (self.turns - 1)


FULL = Size()
SMALL = Size(
    context=160, prompt=30, turns=3, new=4, episodes=2, micro_batch=1, exact=1, rounds=1, batch=2, sampled=3,
    learning_steps=1, asked=2,
)  # fmt: skip
"""To try the code."""

_SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "1.5B": {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18_944, "vocab_size": 152_064, "tie_word_embeddings": False,
    },
}  # fmt: skip
MODELS = tuple(_SHAPES)


def config_of(name: str, size: Size) -> Qwen2Config:
    """A model's configuration; with SMALL, two narrow layers in its place."""
    small: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "vocab_size": 1000,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e6}
    shape = _SHAPES[name] | (small if size is SMALL else {})
    return Qwen2Config(max_position_embeddings=32_768, rope_parameters=rope, **shape)


def made(name: str, size: Size, device: str, dtype: torch.dtype) -> Any:
    """A random model of that shape, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(config_of(name, size)).eval().to(dtype)


def rollout(name: str, size: Size, device: str) -> dict[str, Any]:
    """Tokens per second of each engine, and of bare `generate`, in bfloat16."""
    model = made(name, size, device, torch.bfloat16)
    figures: dict[str, Any] = {"conversations": size.batch, "new_tokens": size.sampled}
    try:
        return figures | engines(model, size.batch, size.sampled, continuous=True)
    except Exception as error:  # an engine that cannot run here need not take the others' figures along
        figures["error"] = f"continuous batching: {type(error).__name__}: {error}"
    model = made(name, size, device, torch.bfloat16)
    return figures | engines(model, size.batch, size.sampled, continuous=False)


def info_gain(size: Size, device: str) -> dict[str, Any]:
    """Ways to score information gain, beside each other."""
    threads = torch.get_num_threads()
    try:
        if size is SMALL:
            model = tiny_model(0).eval().to(device)
            return info_gain_ways._table(model, threads, [(2, 1, info_gain_ways.ALL, 1)])
        return info_gain_ways.on(device, 2)
    finally:
        torch.set_num_threads(threads)


def learning(size: Size, device: str) -> dict[str, Any]:
    """A run of IGPO in the tiny world: exact match in a world of other names, before and after."""
    evaluate = _evaluation(Trial(recipe="igpo", rate=5e-4, seed=0))
    policy = tiny_policy(*load_policy_model(WARM_START, device))
    config = replace(tiny_config(0, size.learning_steps), evaluate_every=0, save_every=size.learning_steps)
    env = training_env(training_world(0), config.questions_per_step * config.group_size)
    before = evaluate(policy, size.asked)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(policy, env, tiny_recipe("igpo"), config, Path(folder) / "run")
        _, seconds = timed(lambda: train(run), device)
    figures = {"before": before, "after": evaluate(policy, size.asked)}
    return {"steps": size.learning_steps, "training_s": round(seconds, 2)} | figures


def wait(device: str) -> None:
    """Until the device has done all that it was asked for."""
    if device != "cpu":
        torch.cuda.synchronize()


def timed(act: Callable[[], Any], device: str) -> tuple[Any, float]:
    """The result, and the seconds until the device was done with it."""
    wait(device)
    begun = time.perf_counter()
    result = act()
    wait(device)
    return result, time.perf_counter() - begun


class Step:
    """A training step, phase by phase, of a model with its learner: bfloat16, gradient checkpointing, GRPO's loss.

    The gradients stay from an update to the next, as they do in the training loop.
    """

    def __init__(
        self, name: str, size: Size, device: str, *, attention: str | None = None, liger: bool = False
    ) -> None:
        self.size, self.device = size, device
        self.settings = config_of(name, size).to_json_string(use_diff=False)
        self.rank = RANK if name == "7B" else None
        model = made(name, size, device, torch.float32)
        if attention is not None:
            model.set_attn_implementation(attention)
        model = with_liger(model) if liger else model
        self.model = model if self.rank is None else with_lora(model, rank=self.rank, alpha=2 * self.rank)
        self.config = TrainConfig(
            micro_batch=size.micro_batch, learning_rate=1e-6, bf16=True, gradient_checkpointing=True
        )
        self.learner: Learner = make_learner(self.model, tiny_tokenizer(), self.config)
        self.seconds: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}

    def phase(self, name: str, act: Callable[[], Any]) -> Any:
        """Do something, and note how long it took and, on a GPU, the most bytes that were allocated meanwhile."""
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        result, seconds = timed(act, self.device)
        self.seconds.setdefault(name, []).append(seconds)
        if self.device != "cpu":
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated())
        return result

    def best(self, name: str) -> float:
        """The least seconds of a phase."""
        return min(self.seconds[name])

    def played(self) -> list[Encoded]:
        """Episodes that the model plays, with replies of random words that fill the context."""
        size = self.size
        policy = endless(TransformersPolicy(self.model, tiny_tokenizer(), max_new_tokens=size.new))
        with precision(self.config, self.model.device):
            talks = conversations(size.episodes, (size.prompt, size.prompt))
            talks = played(policy, talks, size.turns, (size.reply, size.reply))
        return [policy.encoder.encode(own) for own in talks]

    def scored(self, encoded: list[Encoded], *, gain: bool, bf16: bool = True) -> list[Scored]:
        """The tokens' log-probabilities, with or without the beliefs in an answer of 8 tokens at every decision."""
        answer = " ".join(map(str, range(20, 20 + info_gain_ways.ANSWER)))
        # Not the tiny tokenizer, which would spell the forced answer's prefix byte by byte.
        encoder: Any = info_gain_ways.Numbers()
        scorer = Scorer(self.model, encoder, PROMPTS["search-r1"], batch_size=self.size.micro_batch)
        with precision(replace(self.config, bf16=bf16), self.model.device):
            return scorer.score(encoded, [[answer] if gain else []] * len(encoded))

    def updated(self, encoded: list[Encoded], old: list[Tensor]) -> float:
        """Take an optimiser step; the gradient's norm."""
        signs = [1.0 if place % 2 else -1.0 for place in range(len(encoded))]
        advantages = [torch.full((len(own.ids),), sign) for own, sign in zip(encoded, signs, strict=True)]
        learned = Experience(encoded, {"old": old, "advantages": advantages})
        own = replace(recipe("grpo"), kl=0.0, entropy=0.0)
        update = Update(self.learner, own, self.config, temperature=1.0, longest=self.size.turns * self.size.new)
        return update.step(learned, range(len(encoded)))["grad_norm"]

    def warmed(self) -> tuple[list[Encoded], list[Tensor]]:
        """Made-up episodes that an update has learned from: it compiles, and makes the optimiser's state."""
        encoded = made_up(self.size, self.model.config.vocab_size)
        old = [torch.full((len(each.ids),), -12.0) for each in encoded]
        self.updated(encoded, old)
        return encoded, old

    def planned(self, longest: int) -> Plan:
        """What the planner says of it."""
        size = self.size
        return plan(
            Job(
                model=Sketch(self.settings, self.rank), context=longest, episodes=size.episodes,
                micro_batch=size.micro_batch, rollout_batch=size.episodes, bf16=True, checkpointing=True, belief=True,
                turn=max(size.prompt, size.reply),
            )
        )  # fmt: skip


def step(name: str, size: Size, device: str) -> dict[str, Any]:
    """A training step's times, MFU of its update, what information gain adds, memory, and the error of bfloat16."""
    own = Step(name, size, device)
    own.warmed()
    encoded = own.phase("rollout", own.played)
    for gain in (False, True):  # a first time, which is not counted
        own.scored(encoded[: size.micro_batch], gain=gain)
    for _ in range(size.rounds):
        plain = own.phase("scoring", lambda: own.scored(encoded, gain=False))
        own.phase("scoring with information gain", lambda: own.scored(encoded, gain=True))
        old = [each.logprobs.cpu() for each in plain]
        norm = own.phase("update", partial(own.updated, encoded, old))
    lengths = [len(each.ids) for each in encoded]
    asked = own.planned(max(lengths))
    return {
        "parameters": asked.counts.parameters,
        "trained": asked.counts.trained,
        "episodes": len(encoded),
        "tokens": sum(lengths),
        "sampled_tokens": sum(turn != OBSERVED for each in encoded for turn in each.turn),
        "seconds": {phase: round(min(took), 4) for phase, took in own.seconds.items()},
        "grad_norm": norm,
        "update_tokens_per_s": round(sum(lengths) / own.best("update"), 1),
        **utilisation(model_flops(asked.counts, encoded), own.best("update"), device),
        "information_gain": overhead(own),
        "memory_gb": memory(own, asked),
        "bf16_error_nats": error_of_bf16(own, encoded[: size.exact]),
    }


KERNELS: dict[str, dict[str, Any]] = {
    "sdpa": {},
    "flash_attention_2": {"attention": "flash_attention_2"},
    "flex_attention": {"attention": "flex_attention"},
    "liger": {"liger": True},
}


def kernels(size: Size, device: str) -> dict[str, Any]:
    """Update tokens/s of the 0.5B model by each attention kernel, and with Liger's, or why there are none."""
    found: dict[str, Any] = {}
    for name, settings in KERNELS.items():
        try:
            own = Step("0.5B", size, device, **settings)
            encoded, old = own.warmed()
            norms = [own.phase("update", partial(own.updated, encoded, old)) for _ in range(size.rounds)]
            tokens = sum(len(each.ids) for each in encoded)
            found[name] = {"update_tokens_per_s": round(tokens / own.best("update"), 1), "grad_norm": norms[0]}
        except Exception as error:  # a package that is missing, or a device that it does not run on
            found[name] = {"why_not": f"{type(error).__name__}: {error}"}
    return found


def made_up(size: Size, vocabulary: int) -> list[Encoded]:
    """Episodes of a micro-batch, of random tokens, of which the last fourth is the policy's."""
    draw = random.Random(0)
    turn = [OBSERVED] * (size.context - size.context // 4) + [0] * (size.context // 4)
    return [Encoded([draw.randrange(10, vocabulary) for _ in turn], turn, []) for _ in range(size.micro_batch)]


def model_flops(counts: Counts, encoded: list[Encoded]) -> float:
    """Floating-point operations that an update needs: 6 N T, and 6 T² for each head's width and layer of causal
    attention. What gradient checkpointing computes once more is not counted. The output layer counts at sampled tokens
    alone, as it is not read at others; frozen weights count 4 N T, as they get no gradient.
    """
    output = counts.vocabulary * counts.width
    frozen = counts.parameters > counts.trained
    total = 0.0
    for own in encoded:
        tokens, sampled = len(own.ids), sum(turn != OBSERVED for turn in own.turn)
        products = (counts.multiplied - output) * tokens + output * sampled
        dense = 4 * products + 2 * counts.trained * tokens if frozen else 6 * products
        total += dense + 6.0 * counts.attention * tokens**2
    return total


def utilisation(flops: float, seconds: float, device: str) -> dict[str, float | None]:
    """TFLOP/s and their share of `PEAK` and of the data sheet's peak; None where there is none."""
    rate = flops / seconds
    said = re.split(r"[\s-]+", device_name(device).lower())
    sheet = next((gpu.tflops for own, gpu in GPUS.items() if own.split("-")[0] in said), None)
    return {
        "tflops": round(rate / 1e12, 2),
        "mfu": None if device == "cpu" else round(rate / PEAK, 4),
        "mfu_of_data_sheet": None if sheet is None else round(rate / (sheet * 1e12), 4),
    }


def device_name(device: str) -> str:
    """What the device calls itself."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


def overhead(own: Step) -> dict[str, float]:
    """What information gain adds, as a share of the step without it, and of the same without the rollout."""
    extra = own.best("scoring with information gain") - own.best("scoring")
    reading = own.best("scoring") + own.best("update")
    return {
        "extra_s": round(extra, 4),
        "of_the_step": round(extra / (reading + own.best("rollout")), 4),
        "of_scoring_and_update": round(extra / reading, 4),
    }


def memory(own: Step, asked: Plan) -> dict[str, dict[str, float | None]]:
    """Phase → the peak as planned and as measured, in units of 10⁹ bytes, and planned over measured."""
    planned = {
        "rollout": asked.phases["rollout"],
        "scoring with information gain": asked.phases["scoring"],
        "update": asked.phases["update"],
    }
    rows: dict[str, dict[str, float | None]] = {}
    for phase, wanted in planned.items():
        found = own.peaks.get(phase)
        rows[phase] = {
            "planned": round(wanted / 1e9, 3),
            "measured": None if found is None else round(found / 1e9, 3),
            "ratio": None if found is None else round(wanted / found, 3),
        }
    return rows


@torch.no_grad()
def error_of_bf16(own: Step, encoded: list[Encoded]) -> dict[str, float]:
    """How far log-probabilities of sampled tokens lie from those in float32, in nats."""
    rough, exact = (own.scored(encoded, gain=False, bf16=bf16) for bf16 in (True, False))
    gaps = torch.cat(
        [
            (a.logprobs - b.logprobs).abs().cpu()[torch.tensor(each.turn) != OBSERVED]
            for a, b, each in zip(rough, exact, encoded, strict=True)
        ]
    )
    return {"tokens": len(gaps), "mean": float(gaps.mean()), "max": float(gaps.max())}
