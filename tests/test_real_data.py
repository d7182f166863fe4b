"""Real passages and questions, where the data are at hand."""

import numpy as np
import pytest

from agentgym_ig.envs import Suite
from benchmarks import real_data
from benchmarks.corpora import DATA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA / "corpus.jsonl.gz").is_file(), reason="needs real data: set AGENTGYM_IG_DATA to its folder"
    ),
]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("real") / "index"
    built = real_data.build(folder)
    assert built["passages"] == 60_000
    return real_data.suite(folder)


def test_bm25_finds_what_it_should(suite: Suite) -> None:
    recall = real_data.recall_at_10(suite)
    for dataset, least in {
        "hotpotqa": 0.80,
        "nq": 0.81,
        "popqa": 0.95,
        "musique": 0.46,
        "2wikimultihopqa": 0.67,
    }.items():
        assert recall[dataset] >= least


def test_policies_play_all_questions(suite: Suite) -> None:
    played = real_data.play(suite)
    for name in suite.questions:
        rows = {policy: own["datasets"][name] for policy, own in played.items()}
        assert rows["oracle"]["em"] == rows["oracle"]["answered"] == rows["oracle"]["format_valid"] == 1.0
        assert rows["retrieve-once"]["em"] < 0.35
        assert rows["oracle"]["failed"] == rows["multi-hop"]["truncated"] == 0
        if "recall" in rows["oracle"]:
            found = [rows[name]["recall"] for name in ("closed-book", "retrieve-once", "multi-hop", "oracle")]
            assert found == sorted(found)
            assert found[0] == 0
    domains = {policy: own["all"]["em"] for policy, own in played.items()}
    assert domains["closed-book"] < domains["retrieve-once"] < domains["oracle"]


def test_information_gain_is_read_on_real_text(suite: Suite) -> None:
    gained = real_data.information_gain(suite, per_dataset=2)
    assert gained["episodes"] == 10
    values = np.array(list(gained["mean_gain_nats"].values()))
    assert np.isfinite(values).all()
    assert np.abs(values).max() > 0


def test_hostile_or_odd_passages_of_the_real_corpus_stay_inside_the_reply(suite: Suite) -> None:
    prompt = suite.rules.texts
    hits = suite.index.search(["html tag answer search", "xml < > markup", "information think"], 50)
    for own in hits:
        reply = prompt.render_shown(prompt.shown([hit.passage for hit in own]))
        assert reply.count("<information>") == reply.count("</information>") == 1
        assert "<answer>" not in reply
