"""The second half of a step: what an update does to the weights, and what it must not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers import Recipe, Run, recipe, train
from agentgym_ig.trainers.aggregation import AGGREGATIONS, token_weights
from agentgym_ig.trainers.collect import longest_episode
from agentgym_ig.trainers.experience import Experience, experience
from agentgym_ig.trainers.kl import KL_ESTIMATORS
from agentgym_ig.trainers.learner import Learner
from agentgym_ig.trainers.loop import prepare, train_step
from agentgym_ig.trainers.losses import LOSSES, clipped_loss, gipo_loss
from agentgym_ig.trainers.update import Update
from tests.runs import begun, fresh, log, paid_env, same, scored, updating, weights

CLOSE: dict[str, Any] = {"atol": 2e-6, "rtol": 0.0}
FULL = replace(recipe("ppo"), entropy=0.01, kl=0.1)
"""All four terms of a loss at once."""


def learned_of(run: Run, learner: Learner) -> Experience:
    batch = scored(run, learner)
    varied = [
        replace(own, turns=(*own.turns[:-1], replace(own.turns[-1], rewards={"outcome": place % 3 / 2})))
        for place, own in enumerate(batch.episodes)
    ]
    kept = [
        replace(new, turns=tuple(map(with_gain, old.turns, new.turns)))
        for old, new in zip(batch.episodes, varied, strict=True)
    ]
    weighted = replace(batch, episodes=kept)
    return experience(weighted, run.recipe.estimator(weighted))


def with_gain(old: Any, new: Any) -> Any:
    gain = {name: value for name, value in old.rewards.items() if name == "info_gain"}
    return replace(new, rewards={**new.rewards, **gain})


def moved(run: Run, learned: Experience | None = None, *, rate: float = 0.1, off: float = 0.0) -> dict[str, Tensor]:
    """The weights after one step of plain gradient descent, the critic's too. off: how far off policy."""
    learner = begun(run, rate=rate)
    learned = learned or learned_of(run, learner)
    if off:
        columns = {
            name: [row + off * wave(row) for row in rows] if name == "old" else rows
            for name, rows in learned.columns.items()
        }
        learned = Experience(learned.encoded, columns)
    updating(run, learner)(learned, 0)
    own = weights(run.policy.model)
    return own | ({f"critic.{name}": own for name, own in weights(learner.critic).items()} if learner.critic else {})


def without_advantages(learned: Experience) -> Experience:
    return Experience(learned.encoded, {**learned.columns, "advantages": [own * 0 for own in learned.columns["old"]]})


def wave(row: Tensor) -> Tensor:
    return torch.sin(torch.arange(len(row), dtype=torch.float32))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **close: Any) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert_close(other[key], tensor, **(close or CLOSE))


LOSS_RECIPES = {
    name: replace(FULL, loss=loss, aggregation=mode)
    for (name, loss), mode in zip(LOSSES.items(), AGGREGATIONS * 2, strict=False)
    if name != "gspo"
}


@pytest.mark.parametrize("name", [*LOSS_RECIPES, "gspo"])
def test_micro_batches_change_nothing(name: str, tmp_path: Path) -> None:
    chosen = LOSS_RECIPES.get(name) or replace(recipe("grpo"), loss=LOSSES["gspo"], kl=0.1, entropy=0.01)
    before = weights(fresh(tmp_path).policy.model)
    learned = learned_of(first := fresh(tmp_path, chosen), begun(first, rate=0.1))
    after = [moved(fresh(tmp_path, chosen, micro_batch=size), learned, off=0.1) for size in (64, 5, 1)]
    assert_same(after[0], after[1])
    assert_same(after[0], after[2])
    assert max(float((after[0][key] - own).abs().max()) for key, own in before.items()) > 1e-4


def test_parts_of_a_batch_are_all_learned_from_once_an_epoch(tmp_path: Path) -> None:
    run = fresh(tmp_path, "grpo", updates_per_step=3, epochs=2)
    learner = begun(run, rate=0.0)
    learned = learned_of(run, learner)
    seen: list[int] = []

    class Watched(Update):
        def step(self, learned: Experience, rows: Sequence[int]) -> dict[str, float]:
            seen.extend(rows)
            return super().step(learned, rows)

    figures = Watched(learner, run.recipe, run.config, temperature=1.0, longest=longest_episode(run))(learned, 0)
    assert sorted(seen[:16]) == sorted(seen[16:]) == list(range(16))
    assert seen[:16] != seen[16:]
    assert figures["updates"] == 6
    written = sum(turn >= 0 for own in learned.encoded for turn in own.turn)
    assert figures["tokens"] == pytest.approx(written / 3)


def test_only_sampled_tokens_have_a_gradient(tmp_path: Path) -> None:
    run = fresh(tmp_path, "ppo")
    learner = begun(run, rate=0.1)
    learned = learned_of(run, learner)
    poisoned = {
        name: [
            row.masked_fill(torch.tensor(own.turn) < 0, 77.0) for row, own in zip(rows, learned.encoded, strict=True)
        ]
        for name, rows in learned.columns.items()
    }
    other = fresh(tmp_path, "ppo")
    assert same(moved(run, learned), moved(other, Experience(learned.encoded, poisoned)))
    assert updating(run, learner)(learned, 0)["tokens"] == sum(
        turn >= 0 for own in learned.encoded for turn in own.turn
    )


def test_without_advantages_nothing_moves(tmp_path: Path) -> None:
    run = fresh(tmp_path, "dapo")
    learner = begun(run, rate=0.1)
    batch = scored(run)
    before = weights(run.policy.model)
    figures = updating(run, learner)(experience(batch, torch.zeros(16, 5)), 0)
    assert figures["grad_norm"] == figures["policy_loss"] == 0.0
    assert same(before, weights(run.policy.model))


@pytest.mark.parametrize("name", ["igpo", "gspo", "cispo", "sapo", "gipo", "ppo", "igpo+dapo"])
def test_the_first_update_is_on_policy(name: str, tmp_path: Path) -> None:
    run = fresh(tmp_path, name)
    learner = begun(run, rate=0.0)
    figures = updating(run, learner)(learned_of(run, learner), 0)
    assert figures["cut"] == figures["damped"] == 0.0
    assert figures["trust"] == pytest.approx(1.0, abs=1e-4)
    assert figures["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert abs(figures["kl"]) < 1e-8
    assert figures["effective"] == pytest.approx(1.0, abs=1e-4)
    assert figures.get("kl_loss", 0.0) == pytest.approx(0.0, abs=1e-8)


def slow_step(run: Run, learned: Experience, term: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Plain gradient descent on a loss made episode by episode from the model's own logits."""
    model = run.policy.model
    mask = [torch.tensor(own.turn) >= 0 for own in learned.encoded]
    share = token_weights(torch.nn.utils.rnn.pad_sequence(mask, batch_first=True), run.recipe.aggregation)
    loss = torch.zeros((), dtype=torch.float64)
    for row, own in enumerate(learned.encoded):
        logits = model(input_ids=torch.tensor([own.ids]), use_cache=False).logits[0, :-1].double()
        every = torch.log_softmax(logits / run.policy.temperature, -1)
        chosen = every.gather(1, torch.tensor(own.ids)[1:, None])[:, 0]
        columns = {name: rows[row][1:].double() for name, rows in learned.columns.items()}
        values = term(every, chosen, columns)
        loss = loss + (values * share[row, 1 : len(own.ids)] * mask[row][1:]).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(float(own.double().square().sum()) for own in gradients))
    clip = min(1.0, run.config.max_grad_norm / (norm + 1e-6))
    named = dict(zip([name for name, _ in model.named_parameters()], gradients, strict=True))
    return {name: own.detach() - 0.1 * clip * named[name] for name, own in model.named_parameters()}


def entropy_term(every: Tensor, chosen: Tensor, columns: dict[str, Tensor]) -> Tensor:
    return 0.3 * (every.exp() * every).sum(-1)


def kl_term(every: Tensor, chosen: Tensor, columns: dict[str, Tensor], estimator: str) -> Tensor:
    x = columns["reference"] - chosen
    return 0.3 * {"k3": x.exp() - x - 1, "k2": x * x / 2, "k1": -x, "abs": x.abs()}[estimator]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_entropy_term_is_that_of_the_whole_distribution(temperature: float, tmp_path: Path) -> None:
    run = fresh(tmp_path, replace(recipe("grpo"), kl=0.0, entropy=0.3))
    run.policy.temperature = temperature
    learned = learned_of(run, begun(run, rate=0.1))
    silent = without_advantages(learned)
    wanted = slow_step(run, silent, entropy_term)
    learner = begun(run, rate=0.1)
    figures = updating(run, learner)(silent, 0)
    got = dict(run.policy.model.named_parameters())
    for name, own in wanted.items():
        assert_close(got[name].detach(), own, **CLOSE)
    assert figures["entropy_loss"] < 0
    assert figures["grad_norm"] > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_the_kl_term_pulls_to_the_reference(estimator: str, tmp_path: Path) -> None:
    run = fresh(tmp_path, replace(recipe("grpo"), kl=0.3, kl_estimator=estimator))
    learner = begun(run, rate=0.1)
    with torch.no_grad():  # away from the reference, which was made before
        for own in run.policy.model.parameters():
            own += 0.01 * torch.sin(torch.arange(own.numel()).reshape(own.shape))
    learned = learned_of(run, learner)
    assert all(not torch.equal(a, b) for a, b in zip(learned.columns["old"], learned.columns["reference"], strict=True))
    silent = without_advantages(learned)
    wanted = slow_step(run, silent, partial(kl_term, estimator=estimator))
    updating(run, learner)(silent, 0)
    got = dict(run.policy.model.named_parameters())
    for name, own in wanted.items():
        assert_close(got[name].detach(), own, **CLOSE)
    assert estimator in KL_ESTIMATORS


def test_a_policy_gradient_is_the_slow_one(tmp_path: Path) -> None:
    run = fresh(tmp_path, "igpo+gipo")
    plain = replace(run, recipe=replace(run.recipe, kl=0.0, entropy=0.0))
    learner = begun(plain, rate=0.1)
    learned = learned_of(plain, learner)
    wanted = slow_step(plain, learned, lambda every, chosen, columns: -columns["advantages"] * chosen)
    updating(plain, learner)(learned, 0)
    got = dict(plain.policy.model.named_parameters())
    for name, own in wanted.items():
        assert_close(got[name].detach(), own, **CLOSE)


class Poisoned:
    """A user's loss that is not a number for one of its calls, counted from 0."""

    def __init__(self, *calls: int) -> None:
        self.calls, self.bad = 0, calls

    def __call__(self, logprobs: Tensor, old: Tensor, advantages: Tensor, /, *, mask: Tensor | None = None) -> Tensor:
        loss = clipped_loss(logprobs, old, advantages, mask=mask)
        if not torch.is_grad_enabled() or not logprobs.grad_fn:
            return loss  # asked for its figures
        self.calls += 1
        return loss * math.nan if self.calls - 1 in self.bad else loss


def state_of(learner: Learner) -> dict[str, Tensor]:
    own = learner.optimizer.state_dict()["state"]
    return {f"{place}.{name}": copy.deepcopy(value) for place, each in own.items() for name, value in each.items()}


@pytest.mark.parametrize("poison", ["loss", "advantage", "old", "reference", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(poison: str, tmp_path: Path) -> None:
    chosen = replace(recipe("grpo"), loss=Poisoned(3, 4, 5)) if poison == "loss" else recipe("grpo")
    run = fresh(tmp_path, chosen, micro_batch=6)
    learner, _ = prepare(run)
    learned = learned_of(run, learner)
    assert updating(run, learner)(learned, 0)["skipped_updates"] == 0  # the optimiser has a state
    before, state = weights(run.policy.model), state_of(learner)
    columns = {name: [row.clone() for row in rows] for name, rows in learned.columns.items()}
    if poison in ("advantage", "old", "reference"):
        name = "advantages" if poison == "advantage" else poison
        columns[name][5][learned.encoded[5].turn.index(0)] = math.nan
    if poison == "gradient":  # the loss itself is finite
        hook = run.policy.model.get_input_embeddings().weight.register_hook(lambda own: own * math.inf)
    figures = updating(run, learner)(Experience(learned.encoded, columns), 1)
    assert (figures["updates"], figures["skipped_updates"]) == (0, 1)
    assert same(before, weights(run.policy.model))
    assert same(state, state_of(learner))
    assert all(own.grad is None for own in run.policy.model.parameters())
    if poison == "gradient":
        hook.remove()
    assert updating(run, learner)(learned, 3)["skipped_updates"] == 0
    assert not same(before, weights(run.policy.model))


def test_a_run_counts_skipped_updates_and_stops_past_the_limit(tmp_path: Path) -> None:
    bad = replace(recipe("grpo"), loss=Poisoned(1, 3))
    train(fresh(tmp_path / "some", bad, env=paid_env(), max_skipped_updates=2))
    assert [row["skipped_updates"] for row in log(tmp_path / "some")] == [0, 1, 0, 1]
    assert [row["updates"] for row in log(tmp_path / "some")] == [1, 0, 1, 0]
    run = fresh(tmp_path / "many", replace(bad, loss=Poisoned(*range(1, 9))), env=paid_env(), max_skipped_updates=1)
    with pytest.raises(FloatingPointError, match="2 updates were skipped"):
        train(run)
    assert [row["skipped_updates"] for row in log(tmp_path / "many")] == [0, 1, 1]


@pytest.mark.parametrize("chosen", [recipe("igpo"), FULL], ids=["igpo", "ppo"])
def test_gradient_checkpointing_changes_nothing(chosen: Recipe, tmp_path: Path) -> None:
    after = []
    for checkpointing in (False, True):
        run = fresh(tmp_path, chosen, env=paid_env(), gradient_checkpointing=checkpointing)
        metrics = train_step(run, begun(run, rate=0.1), 0)
        after.append((weights(run.policy.model), metrics))
    assert_same(after[0][0], after[1][0], atol=1e-7, rtol=0.0)
    assert after[0][1]["grad_norm"] == pytest.approx(after[1][1]["grad_norm"], rel=1e-5)
    assert after[0][1]["grad_norm"] > 0
    assert any(getattr(own, "gradient_checkpointing", False) and own.training for own in run.policy.model.modules())


def test_bfloat16_stays_close_and_keeps_float32_weights(tmp_path: Path) -> None:
    before = weights(fresh(tmp_path).policy.model)
    after = []
    for bf16 in (False, True):
        run = fresh(tmp_path, replace(FULL, loss=gipo_loss), env=paid_env(), bf16=bf16)
        after.append(moved(run))
        assert all(own.dtype == torch.float32 for own in after[-1].values())
    shift = torch.cat([(after[0][key] - own).flatten() for key, own in before.items()])
    other = torch.cat([(after[1][key] - own).flatten() for key, own in before.items()])
    assert torch.cosine_similarity(shift, other, dim=0) > 0.95
    assert not torch.equal(shift, other)
    run = fresh(tmp_path, "igpo", env=paid_env(), bf16=True)
    metrics = train_step(run, begun(run, rate=0.1), 0)
    assert metrics["skipped_updates"] == 0
    assert metrics["ratio"] == pytest.approx(1.0, abs=0.02)


def test_the_critic_learns_what_is_paid(tmp_path: Path) -> None:
    run = fresh(tmp_path, recipe("ppo"), critic_learning_rate=3e-3)
    learner, _ = prepare(run)
    learned = learned_of(run, learner)
    before = weights(run.policy.model)
    first = updating(run, learner)(learned, 0)
    for step in range(1, 12):
        last = updating(run, learner)(learned, step)
    assert last["value_loss"] < 0.7 * first["value_loss"]
    assert first["critic_grad_norm"] > 0
    assert not same(before, weights(run.policy.model))
    assert not {id(own) for own in learner.parameters[0]} & {id(own) for own in learner.parameters[1]}
