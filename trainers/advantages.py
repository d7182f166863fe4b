"""Advantages: pure functions from rewards to one number per turn.

Each takes tensors, computes in float64 and returns float64. `group` (B,) holds one id per question; statistics
never cross groups, save where a docstring says so. `last` (B,) long is the index of each episode's last turn, and no
boundary is ever read from a value. Values off their mask, nan included, change nothing; on it they must be finite. A
spread over a single value, or over equal values, gives 0, never nan. The spread is sqrt(variance + floor) + eps, with
the variance over count - ddof; which of the three a method uses is a default of its function.

Advantages per token are in `token_advantages`, those that need a graph of states in `state_graph`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def standardise(
    values: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    ddof: int,
    floor: float = 0.0,
    eps: float = 1e-6,
    scale: bool = True,
    least: float = 0.0,
) -> Tensor:
    """Each value less its group's mean, over (sqrt(variance + floor) + eps) of its group.

    values, mask (B, K), mask bool; group (B,), an id per row, or (B, K), an id per value. ddof 0 is the population's
    variance, 1 the sample's. `scale=False` only takes off the mean. least: a standard deviation below it counts as
    none, and its group gets 0. Returns (B, K) float64, 0 off the mask. Raises ValueError for other shapes and for a
    value on the mask that is not finite.
    """
    x, mean, variance = _moments(values, mask, group, ddof)
    # float64 keeps the mean of equal values from becoming a difference that eps would blow up.
    centred = (x - mean).masked_fill(~mask, 0.0)
    if not scale:
        return centred
    return (centred / ((variance + floor).sqrt() + eps)).masked_fill(variance < least**2, 0.0)


def _moments(values: Tensor, mask: Tensor, group: Tensor, ddof: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K) float64 each: the values, 0 off the mask; the means of their groups; the variances of their groups."""
    if values.shape != mask.shape or values.dim() != 2 or group.shape not in (values.shape[:1], values.shape):
        shapes = f"values {tuple(values.shape)}, mask {tuple(mask.shape)}, group {tuple(group.shape)}"
        raise ValueError(f"{shapes}: wanted (B, K), (B, K) and (B,) or (B, K)")
    x = finite("the reward", values, mask)
    groups = group if group.dim() == 2 else group[:, None].expand_as(x)
    count = group_sums(mask.double(), groups)
    mean = group_sums(x, groups) / count.clamp(min=1)
    squares = (x - mean).masked_fill(~mask, 0.0).square()
    return x, mean, group_sums(squares, groups) / (count - ddof).clamp(min=1)


def group_sums(values: Tensor, group: Tensor) -> Tensor:
    """For each value the sum over its group; both of one shape."""
    ids, place = group.unique(return_inverse=True)
    sums = torch.zeros(len(ids), dtype=values.dtype, device=values.device)
    return sums.index_add(0, place.flatten(), values.flatten())[place]


def finite(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """The values in float64 with 0 off the mask. Raises ValueError where one on the mask is not finite."""
    x = values.double().masked_fill(~mask, 0.0)  # not values * mask: nan * 0 is nan
    wrong = (~x.isfinite()).nonzero().tolist()
    if wrong:
        raise ValueError(f"{name} at {wrong[0]} is {x[tuple(wrong[0])].item()}, not finite; mask out what has no value")
    return x


def require_shape(shape: tuple[int, ...], **tensors: Tensor) -> None:
    """Raises ValueError, naming them all, where a tensor has another shape."""
    wrong = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor.shape != shape]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: wanted {tuple(shape)}")


def until(last: Tensor, width: int) -> Tensor:
    """(B, K) bool: the turns up to and with each episode's last one, of `width` = K.

    Raises ValueError for an index that none of the K turns has: an episode without a turn has no advantage.
    """
    if ((last < 0) | (last >= width)).any():
        raise ValueError(f"last {last.tolist()}: wanted indices from 0 to {width - 1}; leave out an empty episode")
    return torch.arange(width, device=last.device) <= last[:, None]


def turn_returns(rewards: Tensor, last: Tensor, *, gamma: float | Tensor) -> Tensor:
    """Discounted sum of the rewards from each turn to the last: G_k = r_k + gamma G_(k+1).

    rewards (B, K); last (B,). gamma: per turn, one number or one (B,) per episode (DR-Venus's is w^(1 / turns)).
    Returns (B, K) float64, 0 after the last turn. Raises ValueError for a reward up to there that is not finite.
    """
    return masked_returns(rewards, until(last, rewards.shape[1]), gamma=gamma)


def masked_returns(rewards: Tensor, mask: Tensor, *, gamma: float | Tensor) -> Tensor:
    """Discounted sum of the rewards on the mask from each column on; those off it are passed over as if not there.

    rewards, mask (B, N). Returns (B, N) float64, 0 off the mask. Raises ValueError for a reward that is not finite.
    """
    x = finite("the reward", rewards, mask)
    returns = torch.zeros_like(x)
    after = torch.zeros_like(x[:, 0])
    for column in reversed(range(x.shape[1])):
        on = mask[:, column]
        after = torch.where(on, x[:, column] + gamma * after, after)
        returns[:, column] = after.masked_fill(~on, 0.0)
    return returns


def grpo_advantages(outcome: Tensor, group: Tensor, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): the outcome, standardised in its group, the same for all turns.

    outcome, group (B,). Returns (B,). A group of one gets 0 (verl hands it its raw reward instead). TRL's eps is 1e-4.
    """
    return standardise(outcome[:, None], _all(outcome), group, ddof=ddof, eps=eps)[:, 0]


def drgrpo_advantages(outcome: Tensor, group: Tensor) -> Tensor:
    """Dr.GRPO (Liu et al. 2025, arXiv 2503.20783): the outcome less the mean of its group, not scaled.

    outcome, group (B,). Returns (B,); a group of one gets 0. Its loss divides by a constant, not by lengths.
    """
    return standardise(outcome[:, None], _all(outcome), group, ddof=0, scale=False)[:, 0]


def rloo_advantages(outcome: Tensor, group: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740): the outcome less the mean of the others of its group.

    outcome, group (B,). Returns (B,). A group of one has no others and gets 0 (verl hands it its raw reward).
    """
    centred = drgrpo_advantages(outcome, group)
    count = group_sums(torch.ones_like(centred), group)
    return centred * count / (count - 1).clamp(min=1)


def _all(outcome: Tensor) -> Tensor:
    return torch.ones_like(outcome, dtype=torch.bool)[:, None]


def self_guide_returns(outcome: Tensor, guidance: Tensor, has_guidance: Tensor, *, trust: float) -> Tensor:
    """Self-Guide (arXiv 2604.03098): the outcome plus `trust` times the sum of the policy's own verdicts.

    outcome (B,); guidance, has_guidance (B, K): each turn's verdict as a reward (`agentgym_ig.guide.VERDICTS`) and
    whether it gave one; trust: `agentgym_ig.guide.trust` of the training progress. Returns (B,), for GRPO. With no
    success in a group its advantages come from self-praise alone. Raises ValueError for what is not finite.
    """
    require_shape(has_guidance.shape, guidance=guidance)
    require_shape(has_guidance.shape[:1], outcome=outcome)
    shaped = outcome + trust * finite("the verdict", guidance, has_guidance).sum(1)
    return finite("the shaped return", shaped, torch.ones_like(shaped, dtype=torch.bool))


def igpo_advantages(
    gains: Tensor,
    has_gain: Tensor,
    outcome: Tensor,
    last: Tensor,
    group: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    joint: bool = False,
    scale: bool = True,
    gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
    ddof: int = 0,
    floor: float = 1e-8,
    eps: float = 1e-6,
) -> Tensor:
    """IGPO (arXiv 2510.14967 v2, eqs. 5 and 6): discounted sum of standardised turn rewards, from the last turn back.

    gains, has_gain (B, K): information gain of each turn and whether it has one; outcome, group (B,);
    last (B,) long: index of each episode's last turn, where its outcome stands. gamma discounts per turn.
    joint: gains and outcomes in one standardisation (v1) instead of one each. Weights act afterwards.
    Returns (B, K), 0 after the last turn.

    Population variance, sqrt(variance + 1e-8) + 1e-6, as the released code. Unlike it, a turn without a gain
    contributes nothing and the others keep theirs; turn boundaries come from indices, so a turn whose
    standardised gain is exactly 0 is still a turn. Raises ValueError for a gain on or after the last turn.
    """
    rewards, at_last = _turn_rewards(gains, has_gain, outcome, last)
    pools = [has_gain | at_last] if joint else [has_gain, at_last]
    z = [standardise(rewards, pool, group, ddof=ddof, floor=floor, eps=eps, scale=scale) for pool in pools]
    weight = torch.where(at_last, outcome_weight, gain_weight)
    return turn_returns(torch.stack(z).sum(0) * weight, last, gamma=gamma)


def igpo_by_turn_advantages(
    gains: Tensor,
    has_gain: Tensor,
    outcome: Tensor,
    last: Tensor,
    group: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
    ddof: int = 0,
    floor: float = 1e-8,
    eps: float = 1e-6,
) -> Tensor:
    """IGPO with each gain standardised among those of its question *at the same turn*, as A²TGPO proposes (arXiv
    2605.06200; its division by the root of the number of terms and its clipping are not here).

    Arguments, result and errors as for `igpo_advantages`. A turn that a single episode has reached gets a gain of 0.
    """
    rewards, at_last = _turn_rewards(gains, has_gain, outcome, last)
    width = gains.shape[1]
    cell = group.unique(return_inverse=True)[1][:, None] * width + torch.arange(width, device=group.device)
    gain = standardise(rewards, has_gain, cell, ddof=ddof, floor=floor, eps=eps)
    own = standardise(rewards, at_last, group, ddof=ddof, floor=floor, eps=eps)
    return turn_returns(gain * gain_weight + own * outcome_weight, last, gamma=gamma)


def igpo_scaled_advantages(
    gains: Tensor,
    has_gain: Tensor,
    outcome: Tensor,
    last: Tensor,
    group: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
    ddof: int = 0,
    floor: float = 1e-8,
    eps: float = 1e-6,
    least: float = 0.3,
    most: float = 10.0,
) -> Tensor:
    """DR-Venus's `scaled_separate` form of IGPO (its released code): standardised gains brought to the size of the
    standardised outcomes, by the factor min(most, max(least, mean |outcomes|) / (mean |gains| + eps)).

    Arguments, result and errors as for `igpo_advantages`. The two means are over the *whole batch*, as released: here
    the other questions do change a question's advantages.
    """
    rewards, at_last = _turn_rewards(gains, has_gain, outcome, last)
    gain = standardise(rewards, has_gain, group, ddof=ddof, floor=floor, eps=eps)
    own = standardise(rewards, at_last, group, ddof=ddof, floor=floor, eps=eps)
    gain_size = gain[has_gain].abs().mean() if has_gain.any() else gain.new_tensor(1.0)
    factor = (own[at_last].abs().mean().clamp(min=least) / (gain_size + eps)).clamp(max=most)
    return turn_returns(gain * factor * gain_weight + own * outcome_weight, last, gamma=gamma)


def igpo_raw_advantages(
    gains: Tensor,
    has_gain: Tensor,
    outcome: Tensor,
    last: Tensor,
    group: Tensor,
    *,
    gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
    ddof: int = 0,
    floor: float = 1e-8,
    eps: float = 1e-6,
) -> Tensor:
    """DR-Venus's `raw_ig` form of IGPO (its released code): a turn's own gain over the spread of the question's gains,
    their mean not taken off, plus the standardised outcome on every turn; nothing is summed over turns.

    So a turn that gains nothing is worth as much as a turn that is not taken. Arguments, result and errors as for
    `igpo_advantages`. Gains whose variance is not above `floor` (one alone, or all equal) are left at their size;
    where several are equal the release divides them by about 1e-4 instead. A turn without a gain keeps the outcome.
    """
    rewards, at_last = _turn_rewards(gains, has_gain, outcome, last)
    x, _, variance = _moments(rewards, has_gain, group, ddof)
    spread = torch.where(variance > floor, (variance + floor).sqrt(), 1.0)
    own = standardise(rewards, at_last, group, ddof=ddof, floor=floor, eps=eps).sum(1, keepdim=True)
    advantages = x / (spread + eps) * gain_weight + own * outcome_weight
    return advantages.masked_fill(~until(last, gains.shape[1]), 0.0)


def igpo_returns(
    gains: Tensor,
    has_gain: Tensor,
    outcome: Tensor,
    last: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
) -> Tensor:
    """IGPO's turn rewards summed from the last turn back with no normalisation at all.

    Arguments, result and errors as for `igpo_advantages`. With gamma and weights 1 the gains telescope: a turn gets
    the final belief less the belief before it, plus the outcome.
    """
    rewards, at_last = _turn_rewards(gains, has_gain, outcome, last)
    weight = torch.where(at_last, outcome_weight, gain_weight)
    return turn_returns(finite("the reward", rewards, has_gain | at_last) * weight, last, gamma=gamma)


def _turn_rewards(gains: Tensor, has_gain: Tensor, outcome: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) float64 rewards, the outcome on the last turn; (B, K) bool, which turn is the last."""
    if gains.dim() != 2:
        raise ValueError(f"gains {tuple(gains.shape)}: wanted (B, K)")
    require_shape(gains.shape, has_gain=has_gain)
    require_shape(gains.shape[:1], outcome=outcome, last=last)
    until(last, gains.shape[1])
    turns = torch.arange(gains.shape[1], device=last.device)
    if (has_gain & (turns >= last[:, None])).any():
        raise ValueError("a gain stands on or after an episode's last turn; the answering turn has none")
    at_last = turns == last[:, None]
    return torch.where(at_last, outcome[:, None].double(), gains.double()), at_last


def igpo_gae_advantages(
    beliefs: Tensor,
    outcome: Tensor,
    last: Tensor,
    group: Tensor,
    *,
    lam: float = 0.5,
    gain_weight: float = 1.0,
    outcome_weight: float = 1.0,
    ddof: int = 0,
    eps: float = 1e-6,
    least: float = 1e-4,
) -> Tensor:
    """The belief as a critic (ours): generalised advantage estimation over the belief, plus GRPO's outcome term.

    beliefs (B, K): the *probability* of the gold answer before each turn, so for a turn that followed no search the
    same as before the turn ahead of it; all are needed up to the last turn. outcome, last, group (B,).

    A searching turn's error is the belief after it less the belief before it, which is its information gain; the last
    turn's is the outcome less the belief. Summing these errors backwards with the decay `lam` per turn (1: outcome
    less belief; 0: each error alone) and standardising them over all turns of the question, then adding the
    standardised outcome, gives the advantage. IGPO itself never closes its sum of gains, so finding the evidence pays
    whatever is then answered.

    Returns (B, K), 0 after the last turn. A standard deviation below `least` counts as none. Raises ValueError for a
    belief or an outcome that is not finite.
    """
    if beliefs.dim() != 2:
        raise ValueError(f"beliefs {tuple(beliefs.shape)}: wanted (B, K)")
    require_shape(beliefs.shape[:1], outcome=outcome, last=last)
    turns = until(last, beliefs.shape[1])
    before = finite("the belief", beliefs, turns)
    at_last = torch.arange(beliefs.shape[1], device=last.device) == last[:, None]
    after = torch.where(at_last, outcome[:, None].double(), before.roll(-1, 1))
    errors = turn_returns(after - before, last, gamma=lam)
    z = standardise(errors, turns, group, ddof=ddof, eps=eps, least=least)
    own = standardise(outcome[:, None], _all(outcome), group, ddof=ddof, eps=eps, least=least)
    return (z * gain_weight + own * outcome_weight).masked_fill(~turns, 0.0)
