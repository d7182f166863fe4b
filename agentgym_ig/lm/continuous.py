"""A policy over transformers' continuous batching: requests come and go in one running, paged batch. For a GPU.

Written to what transformers 5.17 and 5.23 both have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from agentgym_ig.errors import EngineFailed
from agentgym_ig.grammar import GRAMMARS
from agentgym_ig.lm import CACHED_TOKENS
from agentgym_ig.lm.alone import alone_with
from agentgym_ig.lm.encode import Encoded, Tokenizer
from agentgym_ig.lm.kept import WeightWatch
from agentgym_ig.lm.policy import LocalPolicy, Sampled
from agentgym_ig.types import Conversation

_PAGE = 256
"""Tokens of a page of the cache, as transformers has it."""
_WAIT = 1.0
"""Seconds between two looks at whether the engine still runs."""


class ContinuousPolicy(LocalPolicy):
    """Samples actions by transformers' continuous batching, with the exact token ids and log-probabilities.

    The engine draws its own random numbers in an order of its own: at temperature 0 its actions are those of a
    `TransformersPolicy`, above it they are of the same distribution, but equal seeds need not give equal runs. It knows
    no stop strings. So a request ends at every token that could complete one, and where none is complete it is sent
    again with what was written, of which whole pages are not read a second time.

    Within a `session`, as `rollout` opens one, the engine keeps its pages from call to call, as long as the weights
    stay the same. It computes in the type of the weights, whatever autocast says.

    Args:
        model, tokenizer, temperature, max_new_tokens: as for a `TransformersPolicy`.
        max_cached_tokens: size of the paged cache, which is there as a whole for as long as the engine runs. A token
            takes as much as in a `TransformersPolicy`.
        max_batch_tokens: read in one pass of the model at most.

    Raises EngineFailed, when called, if the engine died; `restart` clears what is left of it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        max_cached_tokens: int = CACHED_TOKENS,
        max_batch_tokens: int = 2048,
    ) -> None:
        super().__init__(model, tokenizer, temperature=temperature, max_new_tokens=max_new_tokens)
        if max_cached_tokens < _PAGE or max_batch_tokens < 1:
            raise ValueError(
                f"max_cached_tokens={max_cached_tokens} must be {_PAGE} or more, max_batch_tokens={max_batch_tokens} 1"
                " or more"
            )
        self._longest_context = min(self._longest_context, max_cached_tokens // _PAGE * _PAGE - max_new_tokens)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        self._stops = sorted(self._ends | self._closing)
        self._generation = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=self._stops, top_k=0, top_p=1.0, **sampling
        )
        # 5.23 takes FlashAttention where it can; it has no kernel for a CPU. 5.17 keeps the model's own.
        known = {own.name for own in fields(ContinuousBatchingConfig)}
        flash = {"auto_switch_to_flash": model.device.type == "cuda"} if "auto_switch_to_flash" in known else {}
        self._batching = ContinuousBatchingConfig(
            num_blocks=max_cached_tokens // _PAGE, max_batch_tokens=max_batch_tokens, return_logprobs=True, **flash
        )
        self._watch: WeightWatch | None = None
        self._sessions = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        """Within it the engine stays ready between calls; its memory is freed at the end."""
        with alone_with(self.model):
            if not self._sessions:
                self._watch = WeightWatch(self.model)
            self._sessions += 1
        try:
            yield
        finally:
            with alone_with(self.model):
                self._sessions -= 1
                if not self._sessions and self._watch is not None:
                    self._watch.close()
                    self._watch = None
                    self.restart()

    def restart(self) -> None:
        """Have the next call start the engine anew."""
        with alone_with(self.model):
            self.model.destroy_cached_continuous_batching_manager()

    def _sample(self, conversations: Sequence[Conversation], contexts: Sequence[Encoded]) -> list[Sampled]:
        if not contexts:
            return []
        if self._watch is not None and self._watch.changed():
            self.restart()
        sampled = [Sampled() for _ in contexts]
        stops = [GRAMMARS[own.grammar].stop_strings for own in conversations]
        seed = np.random.SeedSequence([value for own in conversations for value in (own.seed, own.turn)])
        with torch.random.fork_rng(), self._running() as engine:  # the engine draws from torch's own random numbers
            torch.manual_seed(int(seed.generate_state(1)[0]))
            pending = {self._ask(engine, own, sampled[place]): place for place, own in enumerate(contexts)}
            while pending:
                result = self._result(engine)
                place = pending.pop(result.request_id)
                own = sampled[place]
                own.ids += result.generated_tokens
                own.logprobs += result.logprobs
                if len(own.ids) < self.max_new_tokens and not self._ended(own.ids, stops[place]):
                    pending[self._ask(engine, contexts[place], own)] = place
        return sampled

    def _running(self) -> Any:
        return self.model.continuous_batching_context_manager(
            generation_config=self._generation,
            continuous_batching_config=self._batching,
            persistent_manager=self._sessions > 0,
            warmup=False,
        )

    def _ask(self, engine: Any, context: Encoded, written: Sampled) -> str:
        name: str | None = engine.add_request(
            context.ids + written.ids,
            max_new_tokens=self.max_new_tokens - len(written.ids),
            eos_token_id=self._stops,
        )
        if name is None:
            raise EngineFailed("continuous batching takes no more requests: its generation thread has stopped")
        return name

    def _result(self, engine: Any) -> Any:
        """The next request that is done. Raises EngineFailed where there will be none."""
        while (result := engine.get_result(timeout=_WAIT)) is None or not result.is_finished():
            if result is None and not engine.is_running():
                raise EngineFailed("continuous batching died in the middle of its requests; see its log above")
        if result.error is not None:
            raise EngineFailed(f"continuous batching failed: {result.error}; lower max_batch_tokens if memory ran out")
        return result
