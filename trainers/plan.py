"""What a training run will take, before it is begun: bytes on each GPU phase by phase, tokens and FLOPs of a step.

`footprint.py` counts what a model is and what passes through it hold. Here that becomes a run: pure functions from a
`Job` to a `Plan`. It is an upper bound: every episode is taken to be as long as the settings let it get.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from types import MappingProxyType
from typing import Any

from agentgym_ig.lm import CACHED_TOKENS
from agentgym_ig.lm.decoding import AT_ONCE
from agentgym_ig.trainers.footprint import Counts, Sketch, activations, configuration, counts, reading
from agentgym_ig.trainers.readout import TILE

LOGIT_BYTES = 12
"""For each logit that is there at one time (`readout.TILE`): as the output layer gives it, finished, its share, and its
gradient."""
READ_LOGIT_BYTES = 10
"""The same where no gradient is wanted."""
SAMPLER_BYTES = 40
"""For each logit of the tokens that are sampled at one time: copies in float32 and float64, as the sampler has them."""
CACHE_ROOM = 1.25
"""The sampler's cache over the keys and values that it holds: it has room to grow into (`lm.decoding`)."""
PASSAGE_TOKENS = 200
"""Of a passage of 100 words with its title, about; a choice to be on the safe side."""
QUERIES = {"tags": 1, "tools": 3}
"""Queries that an action can have at most, by action grammar."""
CHARACTERS_PER_TOKEN = 4
"""Of English text, about."""
USABLE = 0.9
"""Share of a GPU's memory that is planned with: the rest is CUDA's own, and lost between blocks. A choice."""
MFU = 0.4
"""Share of the peak at which times are worked out. Arithmetic: nobody measured it here."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: memory in units of 10⁹ bytes, and the peak of dense bfloat16 matrix products in TFLOP/s, if known."""

    name: str
    memory: float
    tflops: float | None = None


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        own.name: own
        for own in (
            Gpu("a10", 24, 125),
            Gpu("l4", 24, 121),
            Gpu("l40s", 48, 362),
            Gpu("a100-40", 40, 312),
            Gpu("a100-80", 80, 312),
            Gpu("h100", 80, 989),
            Gpu("h200", 141, 989),
            Gpu("b200", 180, 2250),
        )
    }
)
"""By name, as the vendor's data sheets have them (SXM where there are several), without sparsity."""


def gpu_of(text: str) -> Gpu:
    """A GPU by its name, or any by its memory in GB. Raises ValueError, listing all names, for what is neither."""
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return Gpu(f"{text} GB", float(text))
    if text.lower() not in GPUS:
        raise ValueError(f"unknown GPU {text!r}; choose one of {', '.join(sorted(GPUS))}, or give its memory in GB")
    return GPUS[text.lower()]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be planned."""

    model: Sketch
    context: int
    """Tokens of the longest episode."""
    episodes: int
    """Of a step, on all GPUs together."""
    micro_batch: int
    """Episodes per scoring and update pass, on each GPU."""
    rollout_batch: int
    """Episodes that are sampled at one time, on each GPU."""
    bf16: bool = False
    checkpointing: bool = False
    reference: bool = False
    """Whether a KL to the first model is read: a copy of it, but for an adapter, which is taken off instead."""
    critic: bool = False
    belief: bool = False
    """Whether beliefs are read, for which scoring keeps keys and values."""
    turn: int | None = None
    """Tokens of the opening, or of a reply, at most: what the sampler reads at once of a conversation that it has kept.
    None for as many as the longest episode has."""
    max_cached_tokens: int = CACHED_TOKENS
    """Tokens whose keys and values the sampler keeps between turns, at most."""
    passes: int = 1
    """How often an update goes through as many episodes as a step has: epochs, and replayed batches."""
    gpus: int = 1
    shard: str = "ddp"
    """ddp: everything on every GPU; fsdp: weights, gradients and optimiser cut into as many parts as there are GPUs."""

    def __post_init__(self) -> None:
        small = [f"{name}={getattr(self, name)}" for name in _AT_LEAST_ONE if getattr(self, name) < 1]
        if small:
            raise ValueError(f"{', '.join(small)} must be 1 or more")
        if self.shard not in SHARDS:
            raise ValueError(f"unknown shard {self.shard!r}; choose one of {', '.join(SHARDS)}")

    @property
    def parts(self) -> int:
        """Into how many parts weights, gradients and optimiser are cut."""
        return self.gpus if self.shard == "fsdp" else 1

    @property
    def size(self) -> int:
        """Bytes of a number in the type that is computed in."""
        return 2 if self.bf16 else 4

    @property
    def dtype(self) -> str:
        """Of the weights while episodes are played and scored: FSDP gathers them in what is computed in."""
        return "bfloat16" if self.parts > 1 and self.bf16 else "float32"

    @property
    def played(self) -> int:
        """Episodes of a step on one GPU, all of them under way together."""
        return ceil(self.episodes / self.gpus)

    @property
    def sampled(self) -> int:
        """Episodes that one GPU samples at one time."""
        return min(self.rollout_batch, self.played)


_AT_LEAST_ONE = ("context", "episodes", "micro_batch", "rollout_batch", "passes", "gpus")
SHARDS = ("ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job takes on each GPU, in bytes, and in a step. phases: phase → bytes at its peak."""

    job: Job
    counts: Counts
    weights: int
    gradients: int
    optimizer: int
    reference: int
    critic: int
    """Its weights and its optimiser's state; its gradients and activations are with the policy's."""
    gathered: int
    """Weights of other GPUs' parts that stand here for a moment."""
    rollout_copy: int
    activations: int
    logits: int
    cache: int
    """Keys and values of the episodes that are sampled at one time, and those kept of the others."""
    sampling: int
    """Reading those episodes, without the cache, and choosing their tokens."""
    scoring: int
    phases: Mapping[str, int]
    flops: Mapping[str, float]
    """Phase → floating-point operations of a step, on all GPUs together."""

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs the most, and its bytes."""
        return max(self.phases.items(), key=lambda own: own[1])

    @property
    def tokens(self) -> int:
        """Of a step, at the most."""
        return self.job.context * self.job.episodes

    def fits(self, gpu: Gpu) -> bool:
        """Whether all phases stay within the share of the memory that can be used."""
        return self.peak[1] <= usable(gpu)

    def seconds(self, gpu: Gpu) -> float | None:
        """All FLOPs of a step at `MFU` of the peak: arithmetic. None where the peak is not known."""
        return None if gpu.tflops is None else sum(self.flops.values()) / (MFU * gpu.tflops * 1e12 * self.job.gpus)


def usable(gpu: Gpu) -> float:
    """Bytes of a GPU that are planned with."""
    return USABLE * gpu.memory * 1e9


def longest_context(
    texts: Any, *, max_turns: int, top_k: int, max_new_tokens: int, max_observation: int | None
) -> tuple[int, int]:
    """Tokens of the longest episode under a `Prompt` and the settings of its rules, and of its opening or a reply,
    whichever is longer; what is not known of them is taken from the constants above.
    """
    opening = sum(len(message.text) for message in texts.opening("?" * 100, max_turns)) // CHARACTERS_PER_TOKEN
    reply = top_k * QUERIES[texts.grammar] * PASSAGE_TOKENS
    observed = (max_turns - 1) * reply
    if max_observation is not None:
        observed, reply = min(observed, max_observation), min(reply, max_observation)
    return opening + max_turns * max_new_tokens + observed, max(opening, reply)


def within_model(context: int, model: Sketch) -> int:
    """The same, or the model's own longest context: longer episodes end there."""
    longest = getattr(configuration(model).get_text_config(), "max_position_embeddings", None)
    return context if longest is None else min(context, longest)


def plan(job: Job) -> Plan:
    """What a job takes. Runs the model on fake tensors, which takes some seconds for a large one."""
    own, size = counts(job.model), job.size
    weights, optimizer = 4 * own.parameters // job.parts, 8 * own.trained // job.parts
    gradients = 4 * (own.trained + (own.trunk if job.critic else 0)) // job.parts
    reference = weights if job.reference and job.model.lora_rank is None else 0
    critic = 12 * own.trunk // job.parts if job.critic else 0
    gathered = size * (own.outside + 2 * own.layer) if job.parts > 1 else 0
    copied = size * own.parameters if job.parts > 1 else 0
    tile = min(TILE, own.vocabulary * job.micro_batch * job.context)
    logits = tile * LOGIT_BYTES + _output_layer(job, own)
    cache, sampling = _rollout(job, own)
    scoring = _scoring(job) + tile * READ_LOGIT_BYTES
    updating = update_activations(job, checkpointing=job.checkpointing)
    resident = weights + optimizer + reference + critic
    phases = {
        "rollout": resident + copied + cache + sampling,
        "scoring": resident + gathered + scoring,
        "update": resident + gathered + gradients + updating + logits,
    }
    return Plan(
        job=job, counts=own, weights=weights, gradients=gradients, optimizer=optimizer, reference=reference,
        critic=critic, gathered=gathered, rollout_copy=copied, activations=updating, logits=logits, cache=cache,
        sampling=sampling, scoring=scoring, phases=phases, flops=step_flops(job, own),
    )  # fmt: skip


def update_activations(job: Job, *, checkpointing: bool) -> int:
    """Bytes that a micro-batch's update holds beside weights, gradients and logits, with the critic's."""
    given: dict[str, Any] = {"bf16": job.bf16, "checkpointing": checkpointing, "sharded": job.parts > 1}
    held = activations(job.model, job.micro_batch, job.context, **given)
    if job.critic:
        held += activations(replace(job.model, lora_rank=None), job.micro_batch, job.context, **given)
    return held


def _output_layer(job: Job, own: Counts) -> int:
    """Bytes of the output layer's gradient before it is added to the others, and of its copy in bfloat16."""
    size = own.vocabulary * own.width
    return size * ((2 if job.bf16 else 0) + (4 if job.model.lora_rank is None else 0))


def _rollout(job: Job, own: Counts) -> tuple[int, int]:
    """Bytes of keys and values, and of reading and choosing beside them.

    All episodes of a step are under way together. Where the sampler cannot keep all of them, it is taken to read those
    that it samples at one time from their beginning.
    """
    whole = reading(job.model, job.sampled, job.context, bf16=job.bf16, masked=True, dtype=job.dtype)
    tokens, rows, beside = job.played * job.context, job.sampled, whole.beside
    if job.turn is not None and job.turn < job.context and tokens <= job.max_cached_tokens:
        new = reading(job.model, rows, job.turn, bf16=job.bf16, masked=False, dtype=job.dtype)
        beside = new.beside + rows * job.turn * job.context  # a byte for each pair in the mask
    token = whole.cached * job.size // (rows * job.context)
    held = (
        round(CACHE_ROOM * rows * job.context) + min(AT_ONCE, rows) * job.context + min(tokens, job.max_cached_tokens)
    )
    return held * token, beside + rows * own.vocabulary * SAMPLER_BYTES


def _scoring(job: Job) -> int:
    read = reading(job.model, job.micro_batch, job.context, bf16=job.bf16, masked=False, dtype=job.dtype)
    return read.beside + (read.cached * (2 if job.dtype == "bfloat16" else 4) if job.belief else 0)


def step_flops(job: Job, own: Counts) -> dict[str, float]:
    """Floating-point operations of a step by phase: 2 N T forward, twice that backward (once for frozen weights, which
    get no gradient), and 2 T² for each head's width and layer for causal attention. Sampling is counted once per token;
    it is bound by the memory's bandwidth, not by these.
    """
    dense = 2.0 * own.multiplied * job.context
    attention = 2.0 * own.attention * job.context**2
    forward = dense + attention
    backward = (2.0 if job.model.lora_rank is None else 1.0) * dense + 2 * attention
    update = forward * (2 if job.checkpointing else 1) + backward
    reads = 1 + job.reference + job.critic
    if job.critic:
        update += forward * (4 if job.checkpointing else 3)
    return {
        "rollout": job.episodes * forward,
        "scoring": job.episodes * reads * forward,
        "update": job.episodes * job.passes * update,
    }


def what_to_lower(job: Job, gpu: Gpu) -> list[str]:
    """Options that bring the job's peak down, the mildest first; all together are enough, or the last line says not.

    Empty for a job that fits.
    """
    said: list[str] = []
    for change in (_cheaper, _fewer, _smaller):
        steps = list(change(job, gpu))
        said += [option for option, _ in steps]
        job = steps[-1][1] if steps else job
        if plan(job).fits(gpu):
            return said
    return [*said, "still too much: a GPU with more memory, a smaller model, or fewer and shorter turns"]


def _cheaper(job: Job, gpu: Gpu) -> Iterator[tuple[str, Job]]:
    """What changes no result, or hardly."""
    if not job.bf16 and not plan(job).fits(gpu):
        job = replace(job, bf16=True)
        yield "--bf16", job
    if not job.checkpointing and not plan(job).fits(gpu):
        yield "--gradient-checkpointing", replace(job, checkpointing=True)


def _fewer(job: Job, gpu: Gpu) -> Iterator[tuple[str, Job]]:
    """Fewer episodes at one time, where theirs is the phase that is too large."""
    job = replace(
        job, rollout_batch=job.sampled, max_cached_tokens=min(job.max_cached_tokens, job.played * job.context)
    )
    playing, learning = ("rollout",), ("scoring", "update")
    halved = (("max_cached_tokens", job.context, playing), ("rollout_batch", 1, playing), ("micro_batch", 1, learning))
    for name, least, phases in halved:
        before = job
        while getattr(job, name) > least and any(plan(job).phases[phase] > usable(gpu) for phase in phases):
            job = replace(job, **{name: getattr(job, name) // 2})
        if job != before:
            yield f"--{name.replace('_', '-')} {getattr(job, name)}", job


def _smaller(job: Job, gpu: Gpu) -> Iterator[tuple[str, Job]]:
    """Less on each GPU of what does not depend on the episodes."""
    if job.gpus > 1 and job.shard == "ddp":
        job = replace(job, shard="fsdp")
        yield "--shard fsdp", job
    if job.model.lora_rank is None and not plan(job).fits(gpu):
        yield "--lora-rank 32", replace(job, model=replace(job.model, lora_rank=32))
