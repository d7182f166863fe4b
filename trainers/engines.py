"""Generation engines in training: started again when they die, and compared with what is trained.

What is learned from is always the trainer's own: the packed pass reads every sampled token's log-probability anew, and
`old` is that. An engine's own log-probabilities, in another kernel, precision or batch, say how far the distribution
that it sampled from was from the one that is trained (Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training").
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from agentgym_ig.envs.rollout import Start, VectorSearch, rollout
from agentgym_ig.errors import EngineFailed
from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.policies import Policy
from agentgym_ig.trainers.masked import bounded
from agentgym_ig.types import Trajectory

logger = logging.getLogger(__name__)

RESTARTS = 3
"""How often an engine is started again within one rollout."""
APART = 0.1
"""Nats between engine and trainer beyond which a token counts as apart: a probability that is 10 % off."""


def play(env: VectorSearch, engine: Policy, starts: Sequence[Start]) -> tuple[list[Trajectory], int]:
    """The episodes of a rollout, and how often the engine had to be started again for it.

    When the engine dies, episodes that have ended are kept, and those under way are played again from the same starts,
    so that none is missing or there twice. Raises EngineFailed where it died too often, or has no `restart()`.
    """
    ended: dict[int, Trajectory] = {}
    restarts = 0
    while True:
        try:
            episodes = rollout(env, engine, starts, ended=ended)
        except EngineFailed as error:
            restart = getattr(engine, "restart", None)
            if restart is None or restarts == RESTARTS:
                raise
            restarts += 1
            left = len(starts) - len(ended)
            logger.warning("the engine died (%s); it is started again, and %d episodes are played again", error, left)
            restart()
        else:
            _check_tokens(episodes)
            return episodes, restarts


def _check_tokens(episodes: Sequence[Trajectory]) -> None:
    if any(not turn.action.token_ids for episode in episodes for turn in episode.turns):
        raise ValueError(
            "the engine gave text without its token ids, and tokenised anew it would be another text to learn from; for"
            " an OpenAIPolicy give endpoint='completions', an encoder, temperature 1 and, with vLLM,"
            " extra={'logprobs': 0, 'return_token_ids': True}"
        )


def engine_logprobs(episode: Trajectory, encoded: Encoded) -> Tensor:
    """(T,) the engine's log-probability of each token that it sampled, nan elsewhere and where it gave none."""
    row = torch.full((len(encoded.ids),), math.nan)
    turns = torch.tensor(encoded.turn)
    for number, turn in enumerate(episode.turns):
        own = turns == number
        if len(turn.action.logprobs) == int(own.sum()):
            row[own] = torch.tensor(turn.action.logprobs)
    return row


def disagreement(old: Sequence[Tensor], engine: Sequence[Tensor]) -> dict[str, float]:
    """How far the trainer's log-probabilities are from the engine's, (T,) each per episode; {} where it gave none.

    engine_logprob_gap, engine_logprob_gap_max: mean and largest |difference| in nats. engine_tokens_apart: share of
    tokens with more than `APART`.
    """
    gaps = torch.cat([own.double() - each.double() for own, each in zip(old, engine, strict=True)]).abs()
    gaps = gaps[~gaps.isnan()]
    if not len(gaps):
        return {}
    return {
        "engine_logprob_gap": float(gaps.mean()),
        "engine_logprob_gap_max": float(gaps.max()),
        "engine_tokens_apart": float((gaps > APART).double().mean()),
    }


def importance_weights(old: Tensor, engine: Tensor, encoded: Encoded, cap: float) -> Tensor:
    """(T,) what each token's policy loss is multiplied by, 1 off the sampled tokens.

    w = min(exp(old - engine), cap), the truncated importance sampling of Yao et al. 2025 (TRL's
    `vllm_importance_sampling_correction` in the mode `token_truncate`): tokens are drawn from the engine's
    distribution, so that in expectation w makes of them draws from the trainer's, and the cap bounds the variance.
    The ratio π / old of the loss itself stays as it is. old, engine: (T,) log-probabilities in nats.

    Raises ValueError where the engine gave no log-probability of a token that it sampled.
    """
    sampled = torch.tensor(encoded.turn) != OBSERVED
    difference = old.double() - engine.double()
    if difference[sampled].isnan().any():
        raise ValueError(
            "importance_cap is above 0, but the engine gave no log-probabilities; take one that does, or set it to 0"
        )
    return bounded(difference).exp().clamp(max=cap).masked_fill(~sampled, 1.0)
