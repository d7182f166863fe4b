"""Answer metrics. Each takes a prediction and all accepted answers and returns the best score over them.

Two conventions are in use and differ on the same pair by up to 1, so their names say which is meant:
SQuAD's (lower case, no punctuation, no articles; bag of words), as Search-R1 and most QA papers report, and
IGPO's (punctuation becomes a space, articles stay; set of words), as the IGPO release trains on.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable

_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
_BLANK_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalise_squad(text: str) -> str:
    """SQuAD v1.1: lower case, punctuation deleted, articles removed, white space folded."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_PUNCTUATION)).split())


def normalise_igpo(text: str) -> str:
    """The IGPO release: lower case, punctuation to spaces, white space folded; articles stay."""
    return " ".join(text.lower().translate(_BLANK_PUNCTUATION).split())


def _harmonic(overlap: int, predicted: int, gold: int) -> float:
    return 0.0 if overlap == 0 else 2 * overlap / (predicted + gold)


def _em_squad(prediction: str, answer: str) -> float:
    return float(normalise_squad(prediction) == normalise_squad(answer))


def _em_igpo(prediction: str, answer: str) -> float:
    return float(normalise_igpo(prediction) == normalise_igpo(answer))


def _cover_em(prediction: str, answer: str) -> float:
    wanted = normalise_squad(answer)
    return float(wanted in normalise_squad(prediction)) if wanted else _em_squad(prediction, answer)


def _f1_squad(prediction: str, answer: str) -> float:
    predicted, gold = Counter(normalise_squad(prediction).split()), Counter(normalise_squad(answer).split())
    if not predicted or not gold:  # an article alone; as SQuAD 2.0's scorer has it
        return float(predicted == gold)
    return _harmonic((predicted & gold).total(), predicted.total(), gold.total())


def _f1_igpo(prediction: str, answer: str) -> float:
    predicted, gold = set(normalise_igpo(prediction).split()), set(normalise_igpo(answer).split())
    return _harmonic(len(predicted & gold), len(predicted), len(gold))


_METRICS: dict[str, Callable[[str, str], float]] = {
    "em": _em_squad,
    "f1": _f1_squad,
    "cover_em": _cover_em,
    "em_igpo": _em_igpo,
    "f1_igpo": _f1_igpo,
}
METRICS = tuple(_METRICS)
"""Names of the metrics: `em` and `f1` are SQuAD's; `cover_em` is 1 where the prediction contains the answer, both
normalised as SQuAD does, character by character (Search-R1 calls it subem); the others are the IGPO release's."""


def score(metric: str, prediction: str | None, answers: Iterable[str]) -> float:
    """The metric's best value over all answers, in [0, 1]; 0 for a prediction of None.

    Where normalising leaves nothing (punctuation, or for SQuAD an article alone) the official scorers' behaviour is
    kept: two such texts are an exact match; their F1 is 1 for SQuAD and 0 for IGPO.
    Raises ValueError for a metric that does not exist.
    """
    if metric not in _METRICS:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(METRICS)}")
    if prediction is None:
        return 0.0
    return max((_METRICS[metric](prediction, answer) for answer in answers), default=0.0)
