"""Where engine and trainer disagree: what is logged, and truncated importance weights as the mend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.trainers import Run, TrainConfig
from agentgym_ig.trainers.collect import collect, read
from agentgym_ig.trainers.engines import disagreement, engine_logprobs, importance_weights
from agentgym_ig.trainers.experience import Experience, experience
from agentgym_ig.trainers.loop import prepare, train_step
from agentgym_ig.types import Action, Conversation
from tests.runs import begun, fresh, paid_env, same, updating, weights
from tests.tiny import play

NAN = math.nan


def encoded(*turns: int) -> Encoded:
    return Encoded([7] * len(turns), list(turns), [1])


def test_golden_weights() -> None:
    # exp(-1 - -2) = 2.7183, cut to 2; exp(-1 - -0.5) = 0.6065; equal: 1; not sampled: 1 whatever stands there
    old, engine = torch.tensor([0.0, -1.0, -1.0, -3.0, NAN]), torch.tensor([NAN, -2.0, -0.5, -3.0, -1.0])
    found = importance_weights(old, engine, encoded(OBSERVED, 0, 0, 1, OBSERVED), 2.0)
    assert_close(found, torch.tensor([1.0, 2.0, 0.6065307, 1.0, 1.0], dtype=torch.float64))
    # gaps 1, 0.5, 0: mean 0.5, two of three above 0.1
    assert disagreement([old[:4]], [engine[:4]]) == pytest.approx(
        {"engine_logprob_gap": 0.5, "engine_logprob_gap_max": 1.0, "engine_tokens_apart": 2 / 3}
    )
    assert disagreement([old[:1]], [engine[:1]]) == {}


FLOATS = st.integers(-400, 0).map(lambda value: value / 8)


@settings(deadline=None)
@given(st.lists(st.tuples(FLOATS, FLOATS, st.booleans()), min_size=1, max_size=8), st.integers(8, 80))
def test_weights_are_the_capped_ratio(rows: list[tuple[float, float, bool]], eighths: int) -> None:
    cap = eighths / 8
    old, engine = (torch.tensor([row[place] for row in rows]) for place in (0, 1))
    own = encoded(*[0 if row[2] else OBSERVED for row in rows])
    found = importance_weights(old, engine, own, cap).tolist()
    # the exponent is clamped to ± 20, which only its far side can show
    wanted = [min(math.exp(max(a - b, -20.0)), cap) if sampled else 1.0 for a, b, sampled in rows]
    assert found == pytest.approx(wanted)
    assert importance_weights(old, old, own, cap).tolist() == [1.0] * len(rows)


def test_an_engine_without_log_probabilities_cannot_be_corrected() -> None:
    with pytest.raises(ValueError, match="gave no log-probabilities"):
        importance_weights(torch.zeros(2), torch.tensor([NAN, NAN]), encoded(OBSERVED, 0), 2.0)
    for cap in (-1.0, 0.5, math.inf, NAN):
        with pytest.raises(ValueError, match="importance_cap="):
            TrainConfig(importance_cap=cap)


def test_the_engines_log_probabilities_stand_at_its_tokens(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    batch = read(run, play(6), 0)
    assert batch is not None
    for episode, own, row, old in zip(batch.episodes, batch.encoded, batch.engine, batch.old, strict=True):
        sampled = torch.tensor(own.turn) != OBSERVED
        assert torch.equal(~row.isnan(), sampled)
        assert_close(row[sampled], old[sampled].float(), atol=1e-4, rtol=0)
        silent = replace(episode, turns=(replace(episode.turns[0], action=Action("x", (1,))), *episode.turns[1:]))
        assert engine_logprobs(silent, run.policy.encoder.encode(silent.conversation))[
            len(run.policy.encoder.encode(Conversation(episode.opening)).ids)
        ].isnan()


def test_with_an_engine_that_agrees_the_update_is_the_same(tmp_path: Path) -> None:
    moved = []
    for cap in (0.0, 2.0):
        run = fresh(tmp_path / str(cap), "grpo", env=paid_env(), importance_cap=cap)
        exact = read(run, play(12), 0)
        assert exact is not None
        exact = replace(exact, engine=exact.old, reference=exact.old)
        learner = begun(run, rate=0.5)
        updating(run, learner)(experience(exact, run.recipe.estimator(exact), importance_cap=cap), 0)
        moved.append(weights(run.policy.model))
    assert same(*moved)


class Hotter:
    """An engine that samples at another temperature than it should, and gives that distribution's log-probabilities."""

    def __init__(self, policy: TransformersPolicy, temperature: float) -> None:
        self.own = TransformersPolicy(
            policy.model, policy.encoder.tokenizer, temperature=temperature, max_new_tokens=policy.max_new_tokens
        )

    def __call__(self, conversations: Sequence[Conversation], /) -> list[Action | None]:
        return self.own(conversations)


def hotter(run: Run, temperature: float) -> Run:
    assert isinstance(run.policy, TransformersPolicy)
    return replace(run, engine=Hotter(run.policy, temperature))


def test_a_step_says_how_far_the_engine_is_from_the_trainer(tmp_path: Path) -> None:
    run = fresh(tmp_path, "grpo", env=paid_env())
    agreeing = collect(run, prepare(run)[0], 0).figures
    assert agreeing["engine_logprob_gap_max"] < 1e-4
    assert agreeing["engine_tokens_apart"] == agreeing["engine_restarts"] == 0
    off = hotter(fresh(tmp_path, "grpo", env=paid_env(), importance_cap=2.0), 2.0)
    metrics = train_step(off, prepare(off)[0], 0)
    assert metrics["engine_logprob_gap"] > 0.05
    assert 0 < metrics["engine_tokens_apart"] <= 1
    assert metrics["updates"] == 1


def gradient(logits: Tensor, chosen: Tensor, advantages: Tensor, weight: Tensor) -> Tensor:
    """Of an update's policy loss on a bandit, as `Update` makes it: loss times weight, averaged over tokens."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)[chosen]
    loss = -(logprobs - logprobs.detach()).exp() * advantages[chosen] * weight
    (found,) = torch.autograd.grad(loss.mean(), logits)
    return found


def test_on_a_bandit_the_corrected_gradient_is_nearer_to_the_true_one() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    advantages = torch.tensor([0.1, 1.0, -0.5, 2.0], dtype=torch.float64)
    own, engine = logits.log_softmax(-1), (logits / 1.8).log_softmax(-1)
    true = -(own.exp() * (advantages - own.exp() @ advantages))  # of the loss -E[A], in closed form
    chosen = torch.multinomial(engine.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    rows = encoded(*[0] * len(chosen))
    errors = []
    for cap in (1.0, 1.3, 50.0):
        weight = importance_weights(own[chosen], engine[chosen], rows, cap)
        errors.append(float((gradient(logits, chosen, advantages, weight) - true).norm()))
    plain = float((gradient(logits, chosen, advantages, torch.ones(len(chosen))) - true).norm())
    assert errors[2] < 0.01 < plain  # 200,000 draws: a standard error of about 0.003
    assert errors[2] < errors[1] < plain


def test_the_loss_of_a_token_is_multiplied_by_its_weight(tmp_path: Path) -> None:
    run = fresh(tmp_path, "grpo", env=paid_env())
    batch = read(run, play(8), 0)
    assert batch is not None
    learned = experience(replace(batch, reference=batch.old), torch.ones(len(batch.episodes), 8))
    halved = {**learned.columns, "importance": [0.5 + 0 * own for own in learned.columns["old"]]}
    learner = begun(run, rate=0.1)
    update = updating(run, learner)
    rows = range(len(batch.episodes))
    before = weights(run.policy.model)
    whole = update.step(learned, list(rows))
    run.policy.model.load_state_dict(before)
    half = update.step(Experience(learned.encoded, halved), list(rows))
    assert half["policy_loss"] == pytest.approx(whole["policy_loss"] / 2, rel=1e-5)
    assert half["kl_loss"] == pytest.approx(whole["kl_loss"], abs=1e-9)
    assert half["tokens"] == whole["tokens"]


def test_text_without_token_ids_is_not_learned_from(tmp_path: Path) -> None:
    run = fresh(tmp_path, "grpo")

    def speaks(conversations: Sequence[Conversation]) -> list[str]:
        return ["<answer>a</answer>"] * len(conversations)

    mute = replace(run, engine=speaks)
    with pytest.raises(ValueError, match="text without its token ids"):
        collect(mute, prepare(mute)[0], 0)
    assert isinstance(run.policy, TransformersPolicy)
    cold = replace(run, engine=TransformersPolicy(run.policy.model, run.policy.encoder.tokenizer, temperature=0.5))
    with pytest.raises(ValueError, match=r"the engine has temperature=0.5, and the policy temperature=1.0"):
        prepare(cold)
