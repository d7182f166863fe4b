"""The policies that the benchmark of methods begins with, and the demonstrations they are made of."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from agentgym_ig.envs.rollout import Start, prompts_of, rollout
from agentgym_ig.envs.search import SearchVectorEnv
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES, tinywiki_index, tinywiki_questions
from agentgym_ig.guide import verdict
from agentgym_ig.lm.encode import ConversationEncoder
from agentgym_ig.lm.tiny import tiny_tokenizer
from agentgym_ig.policies import QuestionPolicy
from agentgym_ig.tinywiki import Path as WorldPath
from agentgym_ig.tinywiki import World
from agentgym_ig.trainers.tinywiki import load_policy_model
from agentgym_ig.trainers.warm_start import Demonstrations, Demonstrator, WarmStartConfig, true_verdict
from agentgym_ig.types import Trajectory
from benchmarks.warm_starts import GUIDE_TOKENS, NAMES, hops_of, make, measure

WORLD = World(3, "train")
WEIGHTS = "model.safetensors"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("h3-s2", "h3-guided"):
        monkeypatch.setitem(NAMES, name, replace(NAMES[name], steps=3))


def played(config: WarmStartConfig, hops: int = 3, count: int = 60) -> list[Trajectory]:
    asked = tinywiki_questions(WORLD, f"hop{hops}", count)
    env = SearchVectorEnv(tinywiki_index(WORLD), list(asked), count, TINYWIKI_RULES)
    act = Demonstrator(config, WORLD, {question.id: path for question, path in asked.items()})
    starts = [Start(question.id, 0, number) for number, question in enumerate(asked)]
    return rollout(env, QuestionPolicy(prompts_of(env), act), starts)


def test_every_name_is_of_a_hop_count_that_its_demonstrations_have() -> None:
    assert len({repr(config) for config in NAMES.values()}) == len(NAMES)
    for name, config in NAMES.items():
        assert len(config.shares) == hops_of(name) + 1
        assert config.shares[-1] > 0.5


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"choose one of h3-s0\.5"):
        make("h9", tmp_path)


@pytest.mark.usefixtures("short")
def test_a_policy_is_made_from_its_name_alone_and_once(tmp_path: Path) -> None:
    first, second = make("h3-s2", tmp_path / "a"), make("h3-s2", tmp_path / "b")
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    (first / WEIGHTS).unlink()
    assert make("h3-s2", tmp_path / "a") == first
    assert not (first / WEIGHTS).exists()
    NAMES["h3-s2"] = replace(NAMES["h3-s2"], seed=1)
    make("h3-s2", tmp_path / "a")
    assert (first / WEIGHTS).read_bytes() != (second / WEIGHTS).read_bytes()


@pytest.mark.usefixtures("short")
def test_the_guided_policy_has_tokens_for_the_block_and_keeps_all_others(tmp_path: Path) -> None:
    folder = make("h3-guided", tmp_path)
    model, tokenizer = load_policy_model(str(folder))
    shipped = tiny_tokenizer()
    assert len(tokenizer) == len(shipped) + len(GUIDE_TOKENS) == model.get_input_embeddings().weight.shape[0]
    ids = tokenizer("<guide>neutral</guide><answer>star Amber Ashford</answer>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 8
    assert verdict(tokenizer.decode(ids)) == "neutral"
    text = WORLD.passages[0].text
    assert tokenizer(text)["input_ids"] == shipped(text)["input_ids"]
    figures = measure(folder, 3, questions=4, samples=2)
    assert figures["found"] >= figures["em"] - figures["em without"]
    assert 1 <= figures["turns"] <= 5


def test_the_true_verdict_says_where_the_search_stands() -> None:
    path = WorldPath("film", ("star", "employer", "founder"), ("A", "B", "C", "D"))
    assert true_verdict(path, []) == "neutral"
    assert (
        true_verdict(path, ["A"]) == true_verdict(path, ["A", "B", "A"]) == true_verdict(path, ["X", "A"]) == "neutral"
    )
    assert true_verdict(path, ["A", "X"]) == "negative"
    assert true_verdict(path, ["A", "B", "C"]) == true_verdict(path, ["C", "X"]) == "positive"


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_the_block_changes_no_action(hops: int) -> None:
    plain, guided = played(WarmStartConfig(), hops), played(WarmStartConfig(right_verdict=0.7), hops)
    for one, other in zip(plain, guided, strict=True):
        behind = [turn.action.text.partition("</guide>")[2] for turn in other.turns]
        assert [turn.action.text for turn in one.turns] == behind
        assert not any(turn.rewards["format"] for turn in other.turns)


@pytest.mark.parametrize("chance", [0.0, 0.7, 1.0])
def test_verdicts_are_right_as_often_as_they_should_be(chance: float) -> None:
    asked = tinywiki_questions(WORLD, "hop3", 300)
    titles = {passage.id: passage.title for passage in WORLD.passages}
    counts: Counter[bool] = Counter()
    for episode in played(WarmStartConfig(right_verdict=chance, right=0.4), count=300):
        seen: list[str] = []
        for turn in episode.turns:
            counts[verdict(turn.action.text) == true_verdict(asked[episode.question], seen)] += 1
            seen += [titles[passage] for passage in turn.retrieved]
    assert counts.total() > 700
    assert counts[True] / counts.total() == pytest.approx(chance, abs=0 if chance in (0, 1) else 0.05)


def test_wrong_answers_can_be_kept_to_other_relations() -> None:
    asked = tinywiki_questions(WORLD, "hop3", 300)
    for share, wanted in ((0.0, set()), (0.3, {True})):
        config = WarmStartConfig(right=0.5, answer=share, wrong_answer=0.4, wrong_relation=True)
        named = {
            episode.question.answers[0] == episode.answer
            for episode in played(config, count=300)
            if episode.answer and episode.answer.startswith(asked[episode.question].relations[-1])
        }
        assert named == wanted, "only right answers are of the relation asked for"


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"shares": (0.5, 0.4)}, "add up to 1"),
        ({"shares": (1.0,)}, "one to four hops"),
        ({"right_verdict": 1.5}, "chance from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        WarmStartConfig(**settings)  # type: ignore[arg-type]  # they differ


def test_the_shipped_policy_is_still_made_of_the_same_demonstrations() -> None:
    demonstrations = Demonstrations(WarmStartConfig(), ConversationEncoder(tiny_tokenizer()))
    digest = hashlib.sha256()
    for step in (0, 550):
        for encoded in demonstrations.batch(step):
            digest.update(repr((encoded.ids, encoded.turn)).encode())
    assert digest.hexdigest() == "78c8cff7340407e315edfa99750674848652e6c7bac030c929f316301b5f9664"
