"""Answer metrics against golden pairs and by properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym_ig import METRICS, score

# prediction, accepted answers, then F1 as a set (IGPO), F1 as a bag (SQuAD), EM (IGPO), EM (SQuAD)
GOLDEN = [
    ("The Eiffel Tower, Paris", ["eiffel tower"], 0.666667, 0.8, 0, 0),
    ("New York New York", ["new york"], 1.0, 0.666667, 0, 0),
    ("Jean-Paul Sartre", ["jean paul sartre"], 1.0, 0.4, 1, 0),
    ("new york", ["NYC", "New York City"], 0.8, 0.8, 0, 0),
    ("The Beatles", ["Beatles"], 0.666667, 1.0, 0, 1),
    ("U.S.", ["US"], 0.0, 1.0, 0, 1),
    ("Paris", ["London"], 0.0, 0.0, 0, 0),
    ("", ["x"], 0.0, 0.0, 0, 0),
]


@pytest.mark.parametrize(("prediction", "answers", "f1_set", "f1_bag", "em_igpo", "em_squad"), GOLDEN)
def test_golden(
    prediction: str, answers: list[str], f1_set: float, f1_bag: float, em_igpo: float, em_squad: float
) -> None:
    assert score("f1_igpo", prediction, answers) == pytest.approx(f1_set, abs=2e-6)
    assert score("f1", prediction, answers) == pytest.approx(f1_bag, abs=2e-6)
    assert score("em_igpo", prediction, answers) == em_igpo
    assert score("em", prediction, answers) == em_squad


words = st.text(alphabet="abc ,.-ABé東", max_size=12)


@given(words, st.lists(words, min_size=1, max_size=3))
def test_scores_are_shares_and_more_aliases_never_hurt(prediction: str, answers: list[str]) -> None:
    for metric in METRICS:
        best = score(metric, prediction, answers)
        assert 0 <= best <= 1
        assert best == max(score(metric, prediction, [answer]) for answer in answers)
        assert best == score(metric, prediction, answers[::-1])
    assert score("em", prediction, answers) <= score("f1", prediction, answers)
    if any(character.isalnum() for character in prediction):
        assert score("em_igpo", prediction, answers) <= score("f1_igpo", prediction, answers)


@given(words)
def test_an_answer_matches_itself_however_it_is_written(answer: str) -> None:
    assert score("em_igpo", f"  {answer.upper()}! ", [answer]) == 1.0


def test_nothing_is_worth_nothing() -> None:
    assert score("em", None, ["a b"]) == 0.0
    assert score("f1", "x", []) == 0.0


def test_what_normalises_to_nothing_is_scored_as_the_official_scorers_do() -> None:
    def scores(prediction: str, answer: str) -> dict[str, float]:
        return {metric: score(metric, prediction, [answer]) for metric in METRICS}

    assert scores(")", ")") == {"em": 1.0, "f1": 1.0, "cover_em": 1.0, "em_igpo": 1.0, "f1_igpo": 0.0}
    assert scores("the", "an") == {"em": 1.0, "f1": 1.0, "cover_em": 1.0, "em_igpo": 0.0, "f1_igpo": 0.0}
    assert set(scores("the", "an apple").values()) == {0.0}


@pytest.mark.parametrize(
    ("prediction", "answer", "covered"),
    [
        ("It was the Vistula.", "vistula", 1.0),
        ("russia", "US", 1.0),
        ("Vistula", "the river Vistula", 0.0),
        ("x", "the", 0.0),
    ],
)
def test_cover_em_asks_whether_the_answer_stands_inside(prediction: str, answer: str, covered: float) -> None:
    assert score("cover_em", prediction, [answer]) == covered


def test_unknown_metric_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="em, f1, cover_em, em_igpo, f1_igpo"):
        score("bleu", "a", ["a"])
