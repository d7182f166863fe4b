"""Estimators: from a batch of episodes to advantages, one small config each. The formulas are pure functions in
`advantages`, `token_advantages` and `state_graph`; here they are given the batch's numbers.

An estimator is any function from a `Batch` to (B, K) advantages per turn, or to `TokenAdvantages`. What it returns for
a turn that an episode did not have is not read. Make one of your own a frozen dataclass, so that a run notes its
settings. What an estimator reads beside rewards and tokens it says in its attribute `reads`: the channels `info_gain`
and `self_guide`, the critic's `values`, the `reference` model's log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agentgym_ig.guide import trust
from agentgym_ig.trainers.advantages import (
    drgrpo_advantages,
    finite,
    grpo_advantages,
    igpo_advantages,
    igpo_by_turn_advantages,
    igpo_gae_advantages,
    igpo_raw_advantages,
    igpo_returns,
    igpo_scaled_advantages,
    rloo_advantages,
    self_guide_returns,
)
from agentgym_ig.trainers.experience import Batch, TokenAdvantages
from agentgym_ig.trainers.kl import KL_ESTIMATORS, kl_penalty
from agentgym_ig.trainers.state_graph import RETURN_FORMS, STATE_KEYS, gigpo_advantages, graph_gpo_advantages, state_ids
from agentgym_ig.trainers.token_advantages import (
    gae_advantages,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    whiten,
)

Estimator = Callable[[Batch], Tensor | TokenAdvantages]


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """GRPO: the outcome, standardised among the episodes of a question, for every turn."""

    ddof: int = 1
    """1 for the sample's standard deviation, as in verl and TRL; 0 for the population's."""
    eps: float = 1e-6
    """Added to the standard deviation: 1e-6 in verl, 1e-4 in TRL."""

    def __call__(self, batch: Batch, /) -> Tensor:
        """(B, K) advantages."""
        return _on_all_turns(batch, grpo_advantages(batch.reward, batch.group, ddof=self.ddof, eps=self.eps))


@dataclass(frozen=True, kw_only=True)
class DrGRPO:
    """Dr.GRPO: the outcome less its group's mean, not scaled."""

    def __call__(self, batch: Batch, /) -> Tensor:
        """(B, K) advantages."""
        return _on_all_turns(batch, drgrpo_advantages(batch.reward, batch.group))


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """RLOO: the outcome less the mean of the others of its group."""

    def __call__(self, batch: Batch, /) -> Tensor:
        """(B, K) advantages."""
        return _on_all_turns(batch, rloo_advantages(batch.reward, batch.group))


@dataclass(frozen=True, kw_only=True)
class SelfGuide:
    """Self-Guide: GRPO on the outcome plus the policy's own verdicts, trusted as far as training has come.

    Reads the channel `self_guide`.
    """

    ddof: int = 1
    eps: float = 1e-6

    reads = frozenset({"self_guide"})

    def __call__(self, batch: Batch, /) -> Tensor:
        """(B, K) advantages. Raises ValueError where no turn has the channel."""
        guidance, has = batch.channel("self_guide")
        if not has.any():
            raise ValueError("no turn has the channel self_guide; put add_channel(env, SelfGuide()) around it")
        returns = self_guide_returns(batch.reward, guidance, has, trust=trust(batch.progress))
        return _on_all_turns(batch, grpo_advantages(returns, batch.group, ddof=self.ddof, eps=self.eps))


IGPO_FORMS: dict[str, Callable[..., Tensor]] = {
    "separate": igpo_advantages,
    "joint": partial(igpo_advantages, joint=True),
    "mean-only": partial(igpo_advantages, scale=False),
    "by-turn": igpo_by_turn_advantages,
    "scaled": igpo_scaled_advantages,
    "raw": igpo_raw_advantages,
    "none": lambda gains, has_gain, outcome, last, group, **own: igpo_returns(gains, has_gain, outcome, last, **own),
}
"""How IGPO brings gains and outcomes to one scale. `separate` is that of the paper's second version, `joint` of its
first; `scaled` and `raw` are DR-Venus's, `by-turn` is A²TGPO's."""


@dataclass(frozen=True, kw_only=True)
class IGPO:
    """IGPO: information gain on every searching turn and the outcome on the last, standardised, and summed backwards.

    Reads the channel `info_gain`.
    """

    form: str = "separate"
    """One of `IGPO_FORMS`."""
    gamma: float = 1.0
    """Discount per turn; `raw` sums nothing up and has none."""
    gain_weight: float = 1.0
    """Weight of the gains after they were standardised."""
    outcome_weight: float = 1.0

    reads = frozenset({"info_gain"})

    def __post_init__(self) -> None:
        if self.form not in IGPO_FORMS:
            raise ValueError(f"unknown form {self.form!r} of IGPO; choose one of {', '.join(IGPO_FORMS)}")
        if not 0 <= self.gamma <= 1 or (self.form == "raw" and self.gamma != 1):
            raise ValueError(f"gamma={self.gamma}: wanted within 0 and 1, and left at 1 for the form raw")

    def __call__(self, batch: Batch, /) -> Tensor:
        """(B, K) advantages. Raises ValueError for an episode whose belief has not been read."""
        _require_belief(batch)
        gains, has_gain = batch.channel("info_gain")
        discount: dict[str, Any] = {} if self.form == "raw" else {"gamma": self.gamma}
        return IGPO_FORMS[self.form](
            gains,
            has_gain,
            batch.reward,
            batch.last,
            batch.group,
            gain_weight=self.gain_weight,
            outcome_weight=self.outcome_weight,
            **discount,
        )


@dataclass(frozen=True, kw_only=True)
class BeliefGAE:
    """Ours: the belief in the gold answer as a critic, beside GRPO's outcome; see `igpo_gae_advantages`."""

    lam: float = 0.5
    """How far a change of belief is credited to the turns before it, from 0 (not) to 1 (fully)."""
    gain_weight: float = 1.0
    outcome_weight: float = 1.0

    reads = frozenset({"info_gain"})

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam={self.lam}; wanted within 0 and 1")

    def __call__(self, batch: Batch, /) -> Tensor:
        """(B, K) advantages. Raises ValueError for an episode whose belief has not been read."""
        _require_belief(batch)
        return igpo_gae_advantages(
            beliefs_before_turns(batch),
            batch.reward,
            batch.last,
            batch.group,
            lam=self.lam,
            gain_weight=self.gain_weight,
            outcome_weight=self.outcome_weight,
        )


@dataclass(frozen=True, kw_only=True)
class GiGPO:
    """GiGPO: a turn's discounted return against the other turns taken in its state, plus the episode's advantage."""

    state: str = "docset"
    """What counts as one state: one of `state_graph.STATE_KEYS`. The release's search environment has `raw`."""
    gamma: float = 0.95
    step_weight: float = 1.0
    episode_weight: float = 1.0
    scale: bool = True
    """Divide by standard deviations, as in the paper, or take off means alone, as the release does by default."""

    def __post_init__(self) -> None:
        _check_state(self.state)

    def __call__(self, batch: Batch, /) -> Tensor:
        """(B, K) advantages."""
        return gigpo_advantages(
            batch.rewards,
            batch.reward,
            state_ids(batch.episodes, self.state),
            batch.last,
            batch.group,
            gamma=self.gamma,
            step_weight=self.step_weight,
            episode_weight=self.episode_weight,
            scale=self.scale,
        )


@dataclass(frozen=True, kw_only=True)
class GraphGPO:
    """GraphGPO: how near to success a turn leads, over all that the group has tried, plus the episode's advantage.

    An episode is a success when its answer is an exact match.
    """

    state: str = "docset"
    """What counts as one state: one of `state_graph.STATE_KEYS`. The release's search environment has `raw`."""
    omega: float = 0.2
    """What one turn more to success leaves of the return: 0.1, 0.2 and 0.8 in the paper's three worlds."""
    form: str = "code"
    """One of `state_graph.RETURN_FORMS`. The paper's differs from the release's by a factor, which standardising
    removes, but for the penalty below."""
    graph_weight: float = 1.0
    episode_weight: float = 1.0
    invalid_penalty: float = 0.1
    """Taken off the return (10 at most) of a turn whose action was malformed, as released. What its episode's reward
    loses is the environment's weight of the channel `format`; the release takes 0.1 off a reward of 10."""

    def __post_init__(self) -> None:
        _check_state(self.state)
        if not 0 < self.omega < 1 or self.form not in RETURN_FORMS:
            raise ValueError(
                f"omega={self.omega}: wanted between 0 and 1; form={self.form!r}: one of {', '.join(RETURN_FORMS)}"
            )

    def __call__(self, batch: Batch, /) -> Tensor:
        """(B, K) advantages."""
        malformed, _ = batch.channel("format")
        penalty = self.invalid_penalty * (malformed < 0)
        return graph_gpo_advantages(
            batch.reward,
            batch.success,
            state_ids(batch.episodes, self.state),
            batch.last,
            batch.group,
            omega=self.omega,
            form=self.form,
            graph_weight=self.graph_weight,
            episode_weight=self.episode_weight,
            penalty=penalty,
        )


@dataclass(frozen=True, kw_only=True)
class ReinforcePP:
    """REINFORCE++: from each token on, what the policy still got, less a penalty for leaving the reference model;
    whitened over the batch.
    """

    gamma: float = 1.0
    """Discount per token of the policy."""
    kl: float = 0.0
    """Weight of the penalty."""
    kl_estimator: str = "k1"

    @property
    def reads(self) -> frozenset[str]:
        """The reference, for a penalty."""
        return frozenset({"reference"} if self.kl else ())

    def __post_init__(self) -> None:
        _check_token_returns(self.gamma, 1.0, self.kl, self.kl_estimator)

    def __call__(self, batch: Batch, /) -> TokenAdvantages:
        """(B, T) advantages."""
        rewards = token_rewards(batch, kl=self.kl, estimator=self.kl_estimator)
        return TokenAdvantages(reinforce_pp_advantages(rewards, batch.tokens.sampled, gamma=self.gamma))


@dataclass(frozen=True, kw_only=True)
class ReinforcePPBaseline:
    """REINFORCE++ with a baseline: the outcome less its group's mean on every token, whitened over the batch."""

    def __call__(self, batch: Batch, /) -> TokenAdvantages:
        """(B, T) advantages."""
        mask = batch.tokens.sampled
        return TokenAdvantages(reinforce_pp_baseline_advantages(batch.reward, mask, batch.group))


@dataclass(frozen=True, kw_only=True)
class PPO:
    """PPO's advantages: GAE over the critic's values, whitened over the batch. Time counts in tokens of the policy."""

    gamma: float = 1.0
    lam: float = 1.0
    """1 in Search-R1 and, for language models, usual; below it the critic counts for more."""
    kl: float = 0.0
    """Weight of a penalty for leaving the reference model, as a reward per token."""
    kl_estimator: str = "k1"

    @property
    def reads(self) -> frozenset[str]:
        """The critic's values, and the reference for a penalty."""
        return frozenset({"values", "reference"} if self.kl else {"values"})

    def __post_init__(self) -> None:
        _check_token_returns(self.gamma, self.lam, self.kl, self.kl_estimator)

    def __call__(self, batch: Batch, /) -> TokenAdvantages:
        """(B, T) advantages, and the returns that the critic learns."""
        mask = batch.tokens.sampled
        rewards = token_rewards(batch, kl=self.kl, estimator=self.kl_estimator)
        advantages, returns = gae_advantages(rewards, batch.column("values"), mask, gamma=self.gamma, lam=self.lam)
        return TokenAdvantages(whiten(advantages, mask), returns)


@dataclass(frozen=True, kw_only=True)
class Sum:
    """The sum of several estimators' advantages per turn."""

    parts: tuple[Estimator, ...]

    @property
    def reads(self) -> frozenset[str]:
        """All that any part reads."""
        return frozenset[str]().union(*(getattr(part, "reads", ()) for part in self.parts))

    def __call__(self, batch: Batch, /) -> Tensor:
        """(B, K) advantages. Raises ValueError for a part with advantages per token."""
        given = [part(batch) for part in self.parts]
        if any(isinstance(own, TokenAdvantages) for own in given):
            raise ValueError("only advantages per turn can be added up")
        turns = int(batch.last.max()) + 1
        return torch.stack([own[:, :turns] for own in given if isinstance(own, Tensor)]).sum(0)


def beliefs_before_turns(batch: Batch) -> Tensor:
    """(B, K) the *probability* of the gold answer before each turn, 0 after the last; at most 1, which the belief in
    several answers at once (`aliases="logsumexp"`) may exceed.
    """
    rows = [torch.tensor(own.belief[: len(own.turns)], dtype=torch.float64).exp().reshape(-1) for own in batch.episodes]
    return pad_sequence(rows, batch_first=True).clamp(max=1.0)


def token_rewards(batch: Batch, *, kl: float, estimator: str) -> Tensor:
    """(B, T) each turn's reward on its last token, and on every token the penalty for leaving the reference model.

    Raises ValueError for a turn with a reward but no token, and for a penalty without a reference.
    """
    tokens = batch.tokens
    following = tokens.turn.roll(-1, 1)
    following[:, -1] = -1
    ends = tokens.sampled & (tokens.turn != following)
    rewards = batch.rewards
    counted = tokens.spread(rewards) * ends
    missing = (rewards.sum(1) - counted.sum(1)).abs() > 1e-9
    if missing.any():
        lost = [batch.episodes[row].question.id for row in missing.nonzero()[:, 0].tolist()]
        raise ValueError(f"episodes of {lost} have a reward on a turn without tokens; leave them out")
    if kl:
        penalty = partial(kl_penalty, estimator=estimator, coefficient=kl, mask=tokens.sampled)
        counted = counted + penalty(batch.column("old"), batch.column("reference"))
    return counted


def _on_all_turns(batch: Batch, per_episode: Tensor) -> Tensor:
    return per_episode[:, None].expand(-1, int(batch.last.max()) + 1)


def _require_belief(batch: Batch) -> None:
    for episode in batch.episodes:
        if len(episode.belief) < len(episode.turns):
            raise ValueError(f"the belief of an episode of {episode.question.id!r} has not been read; score it first")
    gains, has_gain = batch.channel("info_gain")
    finite("the information gain", gains, has_gain)


def _check_token_returns(gamma: float, lam: float, kl: float, estimator: str) -> None:
    if not (0 <= gamma <= 1 and 0 <= lam <= 1 and 0 <= kl < math.inf):
        raise ValueError(f"gamma={gamma} and lam={lam}: wanted within 0 and 1; kl={kl}: 0 or more")
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown kl_estimator {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")


def _check_state(state: str) -> None:
    if state not in STATE_KEYS:
        raise ValueError(f"unknown state {state!r}; choose one of {', '.join(STATE_KEYS)}")
