"""TRL's generation as a policy of ours: whatever TRL is set to sample with, exact token ids come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from agentgym_ig.grammar import GRAMMARS
from agentgym_ig.lm.alone import reading
from agentgym_ig.lm.encode import Encoded
from agentgym_ig.lm.policy import LocalPolicy, Sampled
from agentgym_ig.lm.sampling import choose
from agentgym_ig.types import Conversation

NOBODY = Conversation(())
"""What a process without an episode left asks for while others still play."""


class HostedPolicy(LocalPolicy):
    """Samples each turn with a `GRPOTrainer`'s own `_generate_single_turn`, at most `max_completion_length` tokens.

    With transformers' `generate` the random draws are those of `TransformersPolicy`: they come from each conversation's
    own seed and turn, and an episode is the same whatever is sampled beside it. With continuous batching and with vLLM
    they are the engine's. Continuous batching gives no log-probabilities.

    Sampling may be a collective call (vLLM, sharded weights), so all processes sample equally often, and equally many:
    one with fewer episodes asks in vain. Call `finish` when a process has played its last episode.
    """

    def __init__(self, trainer: Any) -> None:
        args = trainer.args
        super().__init__(
            trainer.accelerator.unwrap_model(trainer.model_wrapped),
            trainer.processing_class,
            temperature=args.temperature,
            max_new_tokens=args.max_completion_length,
        )
        self.trainer = trainer
        if trainer.use_vllm:
            if args.vllm_max_model_length is not None:
                longest = args.vllm_max_model_length - self.max_new_tokens
                self._longest_context = min(self._longest_context, longest)
            stops = [stop for grammar in GRAMMARS.values() for stop in grammar.stop_strings]
            trainer.vllm_generation.generation_kwargs = {"stop": stops, "include_stop_str_in_output": True}

    def finish(self) -> None:
        """Take part in sampling until every process has played all its episodes."""
        while wanted := self._wanted(0):
            self._generate([NOBODY] * wanted, [[self._pad]] * wanted)

    def _wanted(self, own: int) -> int:
        """How many turns each process samples now, by how many it wants itself."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return own
        return int(accelerator.gather(torch.tensor([own], device=accelerator.device)).max())

    def _sample(self, conversations: Sequence[Conversation], contexts: Sequence[Encoded]) -> list[Sampled]:
        wanted = self._wanted(len(contexts))
        if not wanted:
            return []
        idle = wanted - len(contexts)
        given = [own.ids for own in contexts] + [[self._pad]] * idle
        rows, logprobs = self._generate([*conversations, *[NOBODY] * idle], given)
        sampled = []
        for conversation, row, own in zip(conversations, rows, logprobs, strict=False):
            stops = GRAMMARS[conversation.grammar].stop_strings
            length = next((n for n in range(1, len(row)) if self._ended(row[:n], stops)), len(row))
            sampled.append(Sampled(row[:length], own[:length]))
        return sampled

    def _generate(
        self, conversations: Sequence[Conversation], contexts: list[list[int]]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """What TRL samples behind each context, and the log-probability of each token; no number where it gives none.

        Raises RuntimeError when TRL gives another number of rows back.
        """
        trainer = self.trainer
        if trainer.use_vllm or trainer.use_transformers_continuous_batching:
            rows, given = trainer._generate_single_turn(contexts, None, {}, 1)
            logprobs = [[math.nan if own is None else own for own in row] for row in given or [[]] * len(rows)]
        else:
            sampler = _Sampler(conversations, self.temperature, self.max_new_tokens)
            stops = [GRAMMARS[conversation.grammar].stop_strings for conversation in conversations]

            def closed(width: int) -> StoppingCriteria:
                return _Closed(lambda row, written: self._ended(written, stops[row]), width)

            with reading(self.model), _controlled(self.model, sampler, closed):
                rows, _ = trainer._generate_single_turn(contexts, None, {}, 1)
            logprobs = torch.stack(sampler.logprobs, 1).tolist()
        if len(rows) != len(contexts):
            raise RuntimeError(f"TRL sampled {len(rows)} turns for {len(contexts)} conversations; see its log above")
        return [list(row) for row in rows], logprobs


class _Sampler(LogitsProcessor):
    """Chooses each row's token from that row's own random numbers, and keeps its log-probability."""

    def __init__(self, conversations: Sequence[Conversation], temperature: float, max_new_tokens: int) -> None:
        draws = [np.random.default_rng((own.seed, own.turn)).random(max_new_tokens) for own in conversations]
        self.draws, self.temperature = torch.tensor(np.stack(draws)), temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores under which only the chosen token can be taken."""
        draws = self.draws[:, len(self.logprobs)].to(scores.device)
        chosen, logprobs = choose(scores, self.temperature, draws)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)


class _Closed(StoppingCriteria):
    """Stops each row that `ended` says has: given its number and what was written."""

    def __init__(self, ended: Callable[[int, list[int]], bool], prompt_width: int) -> None:
        self.ended, self.width = ended, prompt_width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,) whether each row is done."""
        rows = input_ids[:, self.width :].tolist()
        done = [self.ended(row, written) for row, written in enumerate(rows)]
        return torch.tensor(done, device=input_ids.device)


@contextmanager
def _controlled(model: Any, sampler: _Sampler, closed: Callable[[int], StoppingCriteria]) -> Iterator[None]:
    """Add to the model's own `generate`, which TRL calls with its config alone, who chooses tokens and who stops."""
    own = model.generate

    def generate(**inputs: Any) -> Any:
        stopping = StoppingCriteriaList([closed(inputs["input_ids"].shape[1])])
        return own(**inputs, logits_processor=LogitsProcessorList([sampler]), stopping_criteria=stopping)

    model.generate = generate
    try:
        yield
    finally:
        del model.generate
