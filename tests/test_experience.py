"""What an estimator sees of a batch, and what an update learns from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agentgym_ig.lm.encode import OBSERVED
from agentgym_ig.trainers.experience import Batch, Experience, TokenAdvantages, experience
from tests.runs import begun, fresh, scored
from tests.tiny import play


def of_ppo(tmp_path: Path) -> Batch:
    """With every column that there is."""
    run = fresh(tmp_path, "ppo")
    return scored(run, begun(run, rate=0.1))


def test_rewards_are_the_weighted_channels() -> None:
    episodes = play(16)
    batch = Batch(episodes, {"outcome": 2.0, "format": 0.5, "nowhere": 9.0})
    for row, episode in zip(batch.rewards.tolist(), episodes, strict=True):
        own = [2.0 * turn.rewards.get("outcome", 0.0) + 0.5 * turn.rewards.get("format", 0.0) for turn in episode.turns]
        assert row == own + [0.0] * (len(row) - len(own))
    assert batch.reward.tolist() == [2.0 * own.total("outcome") + 0.5 * own.total("format") for own in episodes]
    assert batch.rewards.dtype == torch.float64
    assert batch.reward.sum() > 0
    assert batch.success.tolist() == [own.answer in own.question.answers for own in episodes]
    assert batch.last.tolist() == [len(own.turns) - 1 for own in episodes]
    assert batch.group.tolist() == [number // 4 for number in range(16)]


def test_a_channel_tells_zero_from_none() -> None:
    episode = next(own for own in play(16) if len(own.turns) == 3)
    values: list[float | None] = [0.0, None, 0.5]
    turns = [
        replace(turn, rewards={} if value is None else {"mine": value})
        for turn, value in zip(episode.turns, values, strict=True)
    ]
    longer = next(own for own in play(16) if len(own.turns) == 4)
    channel, has = Batch([replace(episode, turns=tuple(turns)), longer]).channel("mine")
    assert channel.tolist() == [[0.0, 0.0, 0.5, 0.0], [0.0] * 4]
    assert has.tolist() == [[True, False, True, False], [False] * 4]


def test_empty_batches_and_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="no episodes"):
        Batch([])
    empty = replace(play(4)[0], turns=())
    with pytest.raises(ValueError, match=rf"\['{empty.question.id}'\] have no turn"):
        Batch([play(4)[1], empty])


def test_columns_are_asked_for(tmp_path: Path) -> None:
    batch = scored(fresh(tmp_path, "grpo"))
    assert batch.column("old").shape == batch.tokens.ids.shape
    for name in ("reference", "values"):
        with pytest.raises(ValueError, match=f"the batch has no {name}"):
            batch.column(name)


def test_choosing_and_joining_keep_all_of_an_episode_together(tmp_path: Path) -> None:
    batch = of_ppo(tmp_path)
    chosen = torch.arange(16) % 3 == 0
    some, others = batch.only(chosen), batch.only(~chosen)
    assert some is not None
    assert others is not None
    assert batch.only(torch.zeros(16, dtype=torch.bool)) is None
    order = [*chosen.nonzero()[:, 0].tolist(), *(~chosen).nonzero()[:, 0].tolist()]
    joined = Batch.joined([some, others])
    for name in ("episodes", "encoded", "old", "reference", "values"):
        assert all(a is getattr(batch, name)[b] for a, b in zip(getattr(joined, name), order, strict=True)), name
    assert (joined.weights, joined.progress) == (batch.weights, batch.progress)


def test_experience_survives_a_file_bit_for_bit(tmp_path: Path) -> None:
    run = fresh(tmp_path, "ppo")
    batch = of_ppo(tmp_path)
    learned = experience(batch, run.recipe.estimator(batch))
    assert set(learned.columns) == {"old", "advantages", "reference", "values", "returns"}
    save_file(learned.tensors(), tmp_path / "batch.safetensors")
    again = Experience.from_tensors(load_file(tmp_path / "batch.safetensors"))
    assert again.encoded == learned.encoded
    for name, rows in learned.columns.items():
        assert all(torch.equal(own, row) for own, row in zip(again.columns[name], rows, strict=True)), name
    assert all(row.dtype == torch.float32 for rows in again.columns.values() for row in rows)
    for chosen in ([0, 5, 3], range(16)):
        one, other = learned.rows(chosen, "cpu"), again.rows(chosen, "cpu")
        assert torch.equal(one[0].ids, other[0].ids)
        assert all(torch.equal(own, other[1][name]) for name, own in one[1].items())
    both = Experience.joined([learned, again])
    assert len(both.encoded) == 32
    assert torch.equal(both.columns["returns"][20], learned.columns["returns"][4])


def test_every_token_has_the_advantage_of_its_turn(tmp_path: Path) -> None:
    batch = scored(fresh(tmp_path, "grpo"))
    per_turn = torch.arange(16 * 7, dtype=torch.float64).reshape(16, 7) + 1  # more turns than any has
    learned = experience(batch, per_turn)
    for row, (own, encoded) in enumerate(zip(learned.columns["advantages"], batch.encoded, strict=True)):
        wanted = [0.0 if turn == OBSERVED else float(per_turn[row, turn]) for turn in encoded.turn]
        assert own.tolist() == wanted


def bad(batch: Batch, kind: str) -> Tensor | TokenAdvantages:
    turns, tokens = int(batch.last.max()) + 1, batch.tokens
    good = torch.zeros(16, turns, dtype=torch.float64)
    hole = good.clone()
    hole[3, 0] = float("nan")
    hollow = torch.zeros(tokens.ids.shape)
    hollow[2, tokens.sampled[2].nonzero()[0, 0]] = float("inf")
    given: dict[str, Tensor | TokenAdvantages] = {
        "too few turns": good[:, :-1],
        "too few episodes": good[:-1],
        "one number each": good[:, 0],
        "nan": hole,
        "token shape": TokenAdvantages(hollow[:, 1:]),
        "token inf": TokenAdvantages(hollow),
        "returns": TokenAdvantages(torch.zeros(tokens.ids.shape), hollow),
    }
    return given[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("too few turns", r"gave \(16, 4\); wanted one advantage per turn, \(16, 5\)"),
        ("too few episodes", r"gave \(15, 5\)"),
        ("one number each", r"gave \(16,\)"),
        ("nan", "not finite"),
        ("token shape", "wanted one value per token"),
        ("token inf", "not finite"),
        ("returns", "not finite"),
    ],
)
def test_what_an_estimator_may_not_give(kind: str, message: str, tmp_path: Path) -> None:
    batch = of_ppo(tmp_path)
    with pytest.raises(ValueError, match=message):
        experience(batch, bad(batch, kind))


def test_turns_that_an_episode_has_not_are_not_read(tmp_path: Path) -> None:
    batch = scored(fresh(tmp_path, "grpo"))
    beyond = torch.arange(5) > batch.last[:, None]
    assert beyond.any()
    given = torch.ones(16, 5, dtype=torch.float64)
    wanted = experience(batch, given).tensors()
    assert all(
        torch.equal(own, wanted[name])
        for name, own in experience(batch, given.masked_fill(beyond, float("nan"))).tensors().items()
    )
