"""Every method of ours that TRL has too, against the numbers that TRL's own trainers give on the same batch.

TRL runs its whole path: its trainer takes a made rollout (or samples one), reads the likelihoods of the policy and of
its reference with its own fused head, asks a reward function, makes advantages, and then the loss and its gradient by
all weights. Ours reads a copy of the same weights with `token_logprobs`, padded on the other side.

TRL 1.16 has nothing to compare with for REINFORCE++, whitening and generalised advantage estimation (its PPO trainer
is gone); for GIPO, IGPO and the rest of the papers; nor for `gspo_token_loss` where advantages differ in an episode.
Ours has no twin of its `vespo`, `scale_rewards="batch"`, `normalize_then_sum` and `use_bias_correction_kl`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.trainers.advantages import drgrpo_advantages, grpo_advantages, rloo_advantages
from agentgym_ig.trainers.aggregation import Counts, count, token_weights
from agentgym_ig.trainers.batch import TokenBatch, pad
from agentgym_ig.trainers.dapo import overlong_penalty
from agentgym_ig.trainers.kl import kl_loss, kl_penalty
from agentgym_ig.trainers.loss_statistics import loss_statistics, loss_sums
from agentgym_ig.trainers.losses import (
    PolicyLoss,
    cispo_loss,
    clipped_loss,
    gspo_loss,
    gspo_token_loss,
    sapo_loss,
)
from tests.trl_batches import (
    BEHAVIOUR,
    CURRENT,
    EACH,
    LONGEST,
    QUESTIONS,
    Written,
    episodes,
    gradient,
    outcomes,
    padded,
    policy,
    read,
    stir,
    trl_batch,
    trl_mask,
    trl_trainer,
    weights,
)

trl: Any = pytest.importorskip("trl", reason="TRL is not installed: pip install 'agentgym_ig[test]'")

pytestmark = [
    # Of transformers, about what TRL asks it for; then TRL's about its own hook.
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]

EPISODES = QUESTIONS * EACH
MOVED, LEARNT = (BEHAVIOUR, 0.02), (CURRENT, 0.02)
LESS = (CURRENT, 0.003)  # where one ratio stands for the whole episode
GRPO = partial(grpo_advantages, eps=1e-4)  # TRL's eps; ours is verl's
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03}
BY_SEQUENCE: dict[str, Any] = {"clip_low": 0.02, "clip_high": 0.03}
HIGHER, MOST = 0.28, 1.5
UNCORRECTED = {"use_bias_correction_kl": False}  # k3 alone, not k3 times the ratio (DeepSeek-V3.2), which ours lacks


@dataclass(frozen=True)
class Method:
    """TRL's settings, and what is meant to be the same in ours."""

    trl: dict[str, Any]
    loss: PolicyLoss
    aggregation: str
    advantages: Callable[[Tensor, Tensor], Tensor] = GRPO
    width: int | None = None


METHODS = {
    "grpo": Method({"loss_type": "grpo"}, clipped_loss, "seq-mean-token-mean"),
    "bnpo": Method({"loss_type": "bnpo"}, clipped_loss, "token-mean"),
    "dapo": Method(
        {"loss_type": "dapo", "epsilon_high": HIGHER}, partial(clipped_loss, clip_high=HIGHER), "token-mean"
    ),
    # TRL divides by episodes times the longest completion allowed, which is for the caller of ours to say.
    "dr_grpo": Method(
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        clipped_loss,
        "seq-mean-token-sum-norm",
        drgrpo_advantages,
        width=EPISODES * LONGEST,
    ),
    "dual clip": Method(
        {"loss_type": "grpo", "delta": MOST}, partial(clipped_loss, dual_clip=MOST), "seq-mean-token-mean"
    ),
    "gspo": Method({"loss_type": "grpo"} | SEQUENCE, partial(gspo_loss, **BY_SEQUENCE), "seq-mean-token-mean"),
    "gspo-token": Method(
        {"loss_type": "grpo"} | SEQUENCE, partial(gspo_token_loss, **BY_SEQUENCE), "seq-mean-token-mean"
    ),
    "luspo": Method({"loss_type": "luspo"} | SEQUENCE, partial(gspo_loss, **BY_SEQUENCE), "seq-mean-token-sum"),
    "cispo": Method({"loss_type": "cispo", "epsilon_high": MOST}, partial(cispo_loss, ratio_high=MOST), "token-mean"),
    "sapo": Method({"loss_type": "sapo"}, sapo_loss, "seq-mean-token-mean"),
}


@dataclass(frozen=True)
class Ours:
    """Our reading of the batch: the tokens, and what its three policies think of them, (B, T) each."""

    batch: TokenBatch
    model: Any
    own: Tensor
    old: Tensor
    reference: Tensor

    @property
    def mask(self) -> Tensor:
        return self.batch.sampled

    def loss(self, method: Method, advantages: Tensor, beta: float, *, step: Counts | None = None) -> Tensor:
        """advantages (B, T)."""
        loss = method.loss(self.own, self.old, advantages.float(), mask=self.mask)
        loss = loss + beta * kl_loss(self.own, self.reference, mask=self.mask)
        return (loss * token_weights(self.mask, method.aggregation, width=method.width, step=step)).sum()


def ours(written: list[Written]) -> Ours:
    batch, model = padded(written), policy(MOVED, LEARNT)
    with torch.no_grad():
        old, reference = read(policy(MOVED), batch), read(policy(), batch)
    return Ours(batch, model, read(model, batch), old, reference)


def theirs(folder: Path, written: list[Written], **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """TRL's trainer with its policy where ours is, and its batch, which the policy before that made."""
    trainer = trl_trainer(trl.GRPOTrainer, trl.GRPOConfig, folder, written, **UNCORRECTED, **settings)
    stir(trainer.model, *MOVED)
    made = trl_batch(trainer, [{"prompt": f"question {row // EACH}"} for row in range(EPISODES)])
    stir(trainer.model, *LEARNT)
    return trainer, made


def assert_same_step(trainer: Any, made: dict[str, Tensor], loss: Tensor, model: Any, *, within: float = 2e-5) -> None:
    """Loss and gradient by all weights; both libraries compute in float32."""
    wanted = trainer._compute_loss(trainer.model, made)
    assert_close(loss.float(), wanted, atol=2e-6, rtol=within)
    assert_same_direction(gradient(loss, model), gradient(wanted, trainer.model), within=within)


def assert_same_direction(found: Tensor, wanted: Tensor, *, within: float = 2e-5) -> None:
    assert wanted.norm() > 1e-3
    assert (found - wanted).norm() < within * wanted.norm()


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_with_tool_tokens(name: str, beta: float, tmp_path: Path) -> None:
    method, written = METHODS[name], episodes()
    trainer, made = theirs(tmp_path, written, beta=beta, **method.trl)
    mine = ours(written)
    assert 0 < trl_mask(made).sum() < made["completion_mask"].sum()

    advantages = method.advantages(*outcomes(written))
    assert_close(made["advantages"], advantages.float(), atol=1e-6, rtol=1e-5)
    assert_close(made["old_per_token_logps"][trl_mask(made)], mine.old[mine.mask], atol=2e-5, rtol=0)
    loss = mine.loss(method, advantages[:, None].expand(mine.mask.shape), beta)
    assert_same_step(trainer, made, loss, mine.model)


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_without_tools(name: str, tmp_path: Path) -> None:
    method, written = METHODS[name], episodes(holes=False)
    trainer, made = theirs(tmp_path, written, **method.trl)
    mine = ours(written)
    advantages = method.advantages(*outcomes(written))[:, None].expand(mine.mask.shape)
    assert_same_step(trainer, made, mine.loss(method, advantages, 0.0), mine.model)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "dual clip", "cispo", "sapo"])
def test_advantages_that_differ_from_turn_to_turn(name: str, tmp_path: Path) -> None:
    # TRL's loss takes them per token as well, for those who derive from its trainer.
    method, written = METHODS[name], episodes()
    trainer, made = theirs(tmp_path, written, beta=0.1, **method.trl)
    mine = ours(written)
    advantages = mine.batch.spread(torch.tensor([[1.0, -0.5, 2.0], [-1.5, 0.25, -1.0]]).repeat(EACH, 1))
    assert (advantages[mine.mask] != 0).all()
    made["advantages"] = torch.zeros(made["completion_ids"].shape)
    made["advantages"][trl_mask(made)] = advantages[mine.mask]
    assert_same_step(trainer, made, mine.loss(method, advantages, 0.1), mine.model)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "sapo"])
def test_an_episode_without_a_token_of_its_own(name: str, tmp_path: Path) -> None:
    method, written = METHODS[name], episodes()
    written[2] = replace(written[2], own=[False] * len(written[2].own))
    trainer, made = theirs(tmp_path, written, **method.trl)
    mine = ours(written)
    advantages = method.advantages(*outcomes(written))[:, None].expand(mine.mask.shape)
    # TRL counts the episode where it divides by episodes; ours does if it is told so.
    step = Counts(count(mine.mask).tokens, EPISODES)
    assert_same_step(trainer, made, mine.loss(method, advantages, 0.0, step=step), mine.model)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo"])
def test_two_steps_of_training(name: str, tmp_path: Path) -> None:
    # TRL's own loop: it samples once, and takes two steps from that, each in two parts of rows that it has shuffled.
    method, written, rate, beta = METHODS[name], episodes(), 0.02, 0.1
    cut = {"per_device_train_batch_size": EPISODES // 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optimizer": partial(torch.optim.SGD, lr=rate)}
    trainer = trl_trainer(
        trl.GRPOTrainer, trl.GRPOConfig, tmp_path, written, beta=beta, **UNCORRECTED, **cut, **plain, **method.trl
    )
    stir(trainer.model, *MOVED)
    trainer.train()

    model = policy(MOVED)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    whole = padded(written)
    start, step = weights(model), count(whole.sampled)
    with torch.no_grad():
        old, reference = read(model, whole), read(policy(), whole)
    advantages = method.advantages(*outcomes(written))
    for _ in range(2):
        optimizer.zero_grad()
        for rows in (slice(0, 2), slice(2, 6)):
            batch = TokenBatch(whole.ids[rows], whole.real[rows], whole.turn[rows])
            part = Ours(batch, model, read(model, batch), old[rows], reference[rows])
            spread = advantages[rows, None].expand(part.mask.shape)
            part.loss(method, spread, beta, step=step).backward()
        optimizer.step()
    assert_same_direction(weights(model) - start, weights(trainer.model) - start)


def test_the_batch_goes_past_every_bound_and_stays_within_it() -> None:
    written = episodes()
    mine = ours(written)
    log_ratio = ((mine.own - mine.old) * mine.mask).detach()
    up = (GRPO(*outcomes(written)) > 0)[:, None].expand(mine.mask.shape)
    ratio = log_ratio.exp()
    for where, bound in ((up, 1.2), (up, 1 + HIGHER), (~up, 0.8), (~up, MOST), (up, MOST)):
        past = (ratio > bound)[where & mine.mask]
        assert past.any()
        assert not past.all()
    sequence = (log_ratio.sum(1) / mine.mask.sum(1)).exp()
    cut = torch.where(up[:, 0], sequence > 1.03, sequence < 0.98)
    assert cut.any()
    assert not cut.all()


OUTCOMES = [[1.0, 0.0, 0.5, 0.0, 0.0, 1.0], [-2.0, 3.5, 0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 40.0, -40.0, 39.0]]


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_advantages_in_groups(name: str, outcome: list[float], tmp_path: Path) -> None:
    method = METHODS[name]
    written = [replace(each, outcome=own) for each, own in zip(episodes(), outcome, strict=True)]
    _, made = theirs(tmp_path, written, **method.trl)
    # TRL reckons in float32, where equal outcomes may differ from their mean; its eps does not hide all of that.
    assert_close(made["advantages"], method.advantages(*outcomes(written)).float(), atol=1e-4, rtol=1e-5)


def rloo(folder: Path, outcome: list[float], **settings: Any) -> tuple[Any, dict[str, Tensor], TokenBatch]:
    """TRL's RLOO with what it has sampled, and that in our tensors: its trainer takes no rollout, and no tools."""
    trainer = trl_trainer(trl.RLOOTrainer, trl.RLOOConfig, folder, **settings)
    stir(trainer.model, *MOVED)
    prompts = ["What is a nothing", "the What of is a"]
    made = trl_batch(trainer, [{"prompt": prompts[row // EACH], "outcome": own} for row, own in enumerate(outcome)])
    rows = zip(made["prompt_ids"], made["prompt_mask"], made["completion_ids"], made["completion_mask"], strict=True)
    encoded = []
    for prompt, real, completion, own in rows:
        ids, observed = prompt[real.bool()].tolist(), [OBSERVED] * int(real.sum())
        said = completion[own.bool()].tolist()
        encoded.append(Encoded(ids + said, observed + [0] * len(said), []))
    return trainer, made, pad(encoded)


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo(beta: float, outcome: list[float], tmp_path: Path) -> None:
    trainer, made, batch = rloo(tmp_path, outcome, beta=beta)
    model = policy(MOVED)
    with torch.no_grad():
        old, reference = read(model, batch), read(policy(), batch)
    # Its KL is part of the reward: k1 of the policy that sampled, summed over the episode.
    reward = torch.tensor(outcome) + kl_penalty(old, reference, "k1", coefficient=beta, mask=batch.sampled).sum(1)
    advantages = rloo_advantages(reward, torch.arange(EPISODES) // EACH)
    assert_close(made["advantages"], advantages.float(), atol=2e-5, rtol=1e-5)

    stir(trainer.model, *LESS)
    stir(model, *LESS)
    # Its action is the whole completion, with one ratio: ours of one column, the sum over the tokens.
    own = read(model, batch).sum(1, keepdim=True)
    loss = clipped_loss(own, old.sum(1, keepdim=True), advantages[:, None].float()).mean()
    # The sum stands near -100, where float32 has steps of 1e-5, and they go into the ratio.
    assert_same_step(trainer, made, loss, model, within=2e-4)


@pytest.mark.parametrize(("limit", "buffer"), [(16, 4), (10, 10), (7, 1), (100, 32)])
def test_overlong_penalty(limit: int, buffer: int) -> None:
    from trl.rewards.other_rewards import get_soft_overlong_punishment

    lengths = list(range(1, 2 * limit))
    wanted = get_soft_overlong_punishment(limit, buffer)([[0] * length for length in lengths])
    assert overlong_penalty(torch.tensor(lengths), limit=limit, buffer=buffer).tolist() == wanted


def test_figures_to_log(tmp_path: Path) -> None:
    # What TRL logs of a step: the share of tokens cut by the clip, and the mean k3.
    written = episodes()
    trainer, made = theirs(tmp_path, written, beta=0.1, loss_type="grpo")
    trainer._compute_loss(trainer.model, made)
    mine, logged = ours(written), trainer._metrics["eval"]
    advantages = GRPO(*outcomes(written))[:, None].expand(mine.mask.shape)
    sums = loss_sums(clipped_loss, mine.own, mine.old, advantages.float(), mask=mine.mask)
    assert_close(loss_statistics([sums])["cut"], logged["clip_ratio/region_mean"][0], atol=1e-6, rtol=0)
    kl = kl_loss(mine.own, mine.reference, mask=mine.mask)[mine.mask].mean()
    assert_close(float(kl.detach()), logged["kl"][0], atol=1e-5, rtol=0)
