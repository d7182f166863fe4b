"""Dense indexes built, resumed, imported, opened and searched, with a small real encoder."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
import pytest

from agentgym_ig import BuildFailed, IndexUnusable, Passage, SearchFailed
from agentgym_ig.indexes import BuildOptions, build_index, open_index, read_questions
from agentgym_ig.indexes.base import StoredIndex
from agentgym_ig.indexes.build import Kind, Work
from agentgym_ig.indexes.dense import DenseIndex, Faiss, FaissFile, Torch
from agentgym_ig.indexes.encoders import Encoder, EncoderSettings
from agentgym_ig.indexes.estimate import estimate
from agentgym_ig.indexes.manifest import read_manifest
from agentgym_ig.indexes.splitting import check_parts, split_index
from agentgym_ig.indexes.store import write_corpus
from agentgym_ig.provenance import file_sha256
from agentgym_ig.tinywiki import World
from tests.test_encoders import DATA, mini_corpus, minilm
from tests.tiny_encoders import save_encoder

SMALL = BuildOptions(shard=40)
QUERIES = ["capital of Poland", "Which river is longest?", "who was born in the town"]


def corpus() -> list[Passage]:
    """Some 200 passages, two of them alike but for their id."""
    passages = list(World(2).passages)[:200]
    return [*passages, Passage("a-copy", passages[7].title, passages[7].text)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EncoderSettings:
    return EncoderSettings(model=str(save_encoder(tmp_path_factory.mktemp("models") / "tiny-e5")))


@pytest.fixture(scope="module")
def built(model: EncoderSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "torch"
    build_index(corpus(), folder, Torch(model), SMALL)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def made(kind: Kind, folder: Path) -> DenseIndex:
    build_index(corpus(), folder, kind, SMALL)
    return DenseIndex.open(folder, device="cpu")


def ids(index: DenseIndex, queries: Sequence[str] = QUERIES, k: int = 10) -> list[list[str]]:
    return [[hit.passage.id for hit in hits] for hits in index.search(queries, k)]


def test_an_index_is_its_encoders_cosines(model: EncoderSettings, built: Path) -> None:
    index = DenseIndex.open(built, device="cpu")
    assert isinstance(index, StoredIndex)
    assert list(index.passages()) == corpus()
    assert index.corpus_sha256 == read_manifest(built)["corpus_sha256"]
    encoder = Encoder(model, "cpu", "float32")
    scores = encoder.queries(QUERIES) @ encoder.passages(corpus()).T
    for own, right in zip(index.search(QUERIES, 5), scores, strict=True):
        np.testing.assert_allclose([hit.score for hit in own], np.sort(right)[::-1][:5], atol=0.01)
    alike = index.search([f"{corpus()[7].title} {corpus()[7].text}"], len(index))[0]
    places = [place for place, hit in enumerate(alike) if hit.passage.id in ("a-copy", corpus()[7].id)]
    assert places[1] == places[0] + 1
    assert alike[places[0]].score == alike[places[1]].score
    assert alike[places[0]].passage.id == "a-copy"


@pytest.mark.parametrize(
    ("factory", "least"),
    [("Flat", 1.0), ("SQfp16", 1.0), ("HNSW16", 0.9), ("IVF4,SQ8", 0.9), ("PQ8x4fs", 0.9), ("RaBitQ", 0.9)],
)
def test_faiss_indexes_find_what_the_torch_index_finds(
    model: EncoderSettings, built: Path, tmp_path: Path, factory: str, least: float
) -> None:
    found = ids(made(Faiss(model, factory), tmp_path / "index"))
    wanted = ids(DenseIndex.open(built, device="cpu"))
    shared = [len(set(own) & set(right)) / 10 for own, right in zip(found, wanted, strict=True)]
    assert np.mean(shared) >= least
    again = Faiss(model, factory, vectors_from=built)
    build_index(corpus(), tmp_path / "again", again, SMALL)
    assert contents(tmp_path / "again") == contents(tmp_path / "index")


def test_odd_queries_have_defined_results(built: Path) -> None:
    index = open_index(built, device="cpu")
    blank = ["", "   ", "\x00\x07", "\ud800", "​"]
    assert index.search(blank, 3) == [[]] * len(blank)
    odd = ["?", "‮Warsaw", "lone \ud800 surrogate", "word " * 200_000]
    assert [len(hits) for hits in index.search(odd, 3)] == [3] * len(odd)
    assert len(index.search(["Warsaw"], 10**9)[0]) == len(corpus())
    assert index.search([], 3) == []
    with pytest.raises(ValueError, match="at least 1"):
        index.search(["Warsaw"], 0)


@dataclass(frozen=True)
class Stopping(Faiss):
    """Stopped before some shard, or before its files are put together."""

    before: list[str] = field(default_factory=list, kw_only=True)

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        if folder.stem in self.before:
            self.before.remove(folder.stem)
            raise KeyboardInterrupt
        super().digest(passages, folder, progress)

    def assemble(self, work: Work, folder: Path) -> None:
        super().assemble(work, folder)
        if "end" in self.before:
            self.before.remove("end")
            raise KeyboardInterrupt


def test_a_stopped_build_goes_on_and_ends_the_same(model: EncoderSettings, tmp_path: Path) -> None:
    build_index(corpus(), tmp_path / "whole", Faiss(model, "HNSW8"), SMALL)
    stops = ["00000", "00003", "end"]
    kind = Stopping(model, "HNSW8", before=stops)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            build_index(corpus(), tmp_path / "stopped", kind, SMALL)
    build_index(corpus(), tmp_path / "stopped", kind, SMALL)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_killed_build_goes_on_and_ends_the_same(model: EncoderSettings, built: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from agentgym_ig.indexes import BuildOptions, build_index, read_corpus\n"
        "from agentgym_ig.indexes.dense import Torch; from agentgym_ig.indexes.encoders import EncoderSettings\n"
        "kind = Torch(EncoderSettings(model=sys.argv[1]))\n"
        "build_index(read_corpus(sys.argv[2]), Path(sys.argv[3]), kind, BuildOptions(shard=40))"
    )
    write_corpus(tmp_path / "corpus.jsonl", corpus())
    arguments = [model.model, str(tmp_path / "corpus.jsonl"), str(tmp_path / "killed")]
    with subprocess.Popen([sys.executable, "-c", program, *arguments]) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed.partial" / "work" / "00000").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    build_index(corpus(), tmp_path / "killed", Torch(model), SMALL)
    assert contents(tmp_path / "killed") == contents(built)


def test_another_encoder_is_refused(model: EncoderSettings, built: Path, tmp_path: Path) -> None:
    other = save_encoder(tmp_path / "other", seed=1)
    with pytest.raises(IndexUnusable, match=r"was built with encoder .*tiny-e5.*fingerprint.*, not with .*other"):
        DenseIndex.open(built, encoder=str(other), device="cpu")
    prefixed = Encoder(EncoderSettings(model=model.model, query_prefix="prompt: "), "cpu")
    with pytest.raises(IndexUnusable, match=r"'query_prefix': 'query: '.*'query_prefix': 'prompt: '"):
        DenseIndex.open(built, encoder=prefixed)
    with pytest.raises(IndexUnusable, match="was built with encoder"):
        build_index(corpus(), tmp_path / "mixed", Faiss(EncoderSettings(model=str(other)), vectors_from=built), SMALL)
    moved = Path(shutil.copytree(model.model, tmp_path / "moved"))
    assert ids(DenseIndex.open(built, encoder=str(moved), device="cpu")) == ids(DenseIndex.open(built, device="cpu"))


def test_an_index_whose_encoder_is_gone_says_so(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model")
    build_index(corpus()[:5], tmp_path / "index", Torch(EncoderSettings(model=str(folder))), SMALL)
    shutil.rmtree(folder)
    with pytest.raises(IndexUnusable, match=r"no model .*give a model folder"):
        DenseIndex.open(tmp_path / "index")


def test_vectors_of_another_corpus_are_not_reused(model: EncoderSettings, built: Path, tmp_path: Path) -> None:
    kind = Faiss(model, vectors_from=built)
    with pytest.raises(BuildFailed, match="vectors of another corpus"):
        build_index(corpus()[::-1], tmp_path / "other", kind, SMALL)


def test_a_published_file_becomes_an_index(model: EncoderSettings, built: Path, tmp_path: Path) -> None:
    ours = made(Faiss(model, "Flat"), tmp_path / "ours")
    published = tmp_path / "e5_Flat.index"
    shutil.copyfile(tmp_path / "ours" / "index.faiss", published)
    theirs = made(FaissFile(model, published), tmp_path / "theirs")
    assert theirs.search(QUERIES, 10) == ours.search(QUERIES, 10)
    assert ids(theirs) == ids(DenseIndex.open(built, device="cpu"))
    with pytest.raises(BuildFailed, match=r"holds 201 vectors, but the corpus 200 passages"):
        build_index(corpus()[1:], tmp_path / "fewer", FaissFile(model, published), SMALL)
    with pytest.raises(BuildFailed, match=r"do not belong to these passages as .*tiny-e5 embeds them"):
        build_index(corpus()[::-1], tmp_path / "turned", FaissFile(model, published), SMALL)
    wide = EncoderSettings(model=str(save_encoder(tmp_path / "wide", size=48)))
    with pytest.raises(BuildFailed, match=r"vectors of 32 numbers, but .*wide gives 48"):
        build_index(corpus(), tmp_path / "wider", FaissFile(wide, published), SMALL)


def test_published_graphs_are_searched_with_care_and_other_files_refused(
    model: EncoderSettings, tmp_path: Path
) -> None:
    vectors = Encoder(model, "cpu").passages(corpus())
    graph = faiss.index_factory(32, "HNSW16", faiss.METRIC_INNER_PRODUCT)
    graph.add(vectors)
    faiss.write_index(graph, str(tmp_path / "graph.index"))
    index = made(FaissFile(model, tmp_path / "graph.index"), tmp_path / "graph")
    assert read_manifest(tmp_path / "graph")["settings"]["parameters"] == "efSearch=128"
    assert len(index.search(QUERIES, 10)[0]) == 10
    faiss.write_index(faiss.IndexFlatL2(32), str(tmp_path / "l2.index"))
    with pytest.raises(IndexUnusable, match="another metric"):
        made(FaissFile(model, tmp_path / "l2.index"), tmp_path / "l2")
    whole = (tmp_path / "graph.index").read_bytes()
    (tmp_path / "cut.index").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(IndexUnusable, match="no FAISS index, or not all of it"):
        made(FaissFile(model, tmp_path / "cut.index"), tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match="its parts put together"):
        made(FaissFile(model, tmp_path / "part_aa"), tmp_path / "none")


def test_too_little_memory_is_said_with_what_would_fit(model: EncoderSettings, tmp_path: Path) -> None:
    kind = Faiss(model, "Flat")
    with pytest.raises(BuildFailed, match=r"Flat over 201 passages takes about .* MB; allow more .* a torch index"):
        build_index(corpus(), tmp_path / "index", kind, BuildOptions(shard=40, memory=1 << 20))
    build_index(corpus(), tmp_path / "index", kind, SMALL)  # nothing was lost
    assert len(DenseIndex.open(tmp_path / "index", device="cpu")) == 201
    assert kind.memory_needed(21_000_000, tmp_path / "index") > 21_000_000 * 4 * 32


def test_what_a_build_needs_can_be_judged(model: EncoderSettings, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus.jsonl", corpus())
    for kind in (Torch(model), Faiss(model, "IVF64,SQ8")):
        needs = estimate(tmp_path / "corpus.jsonl", kind)
        assert needs.passages == 201
        assert needs.memory_bytes > 1 << 30


def test_the_search_can_be_more_or_less_thorough(model: EncoderSettings, tmp_path: Path) -> None:
    made(Faiss(model, "IVF8,Flat", "nprobe=8"), tmp_path / "index")
    assert read_manifest(tmp_path / "index")["settings"]["parameters"] == "nprobe=64,nprobe=8"
    thorough = DenseIndex.open(tmp_path / "index", device="cpu")
    quick = DenseIndex.open(tmp_path / "index", device="cpu", parameters="nprobe=1")
    assert len(quick.search(QUERIES, 200)[0]) < len(thorough.search(QUERIES, 200)[0])
    with pytest.raises(ValueError, match="do not fit this index"):
        DenseIndex.open(tmp_path / "index", device="cpu", parameters="efSearch=1")


def test_a_model_that_gives_no_numbers_builds_no_index(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_encoder(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BuildFailed, match="values that are no numbers"):
        build_index(corpus(), tmp_path / "index", Torch(EncoderSettings(model=str(folder))), SMALL)


def test_other_folders_are_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(IndexUnusable, match="no index in"):
        DenseIndex.open(tmp_path)
    with pytest.raises(ValueError, match="looks at every vector"):
        DenseIndex.open(built, parameters="nprobe=3")
    cut = Path(shutil.copytree(built, tmp_path / "cut"))
    os.truncate(cut / "vectors" / "00001.npy", 500)
    with pytest.raises(IndexUnusable, match=r"00001\.npy has 500 bytes"):
        DenseIndex.open(cut)


class Failing:
    """A device that is out of memory."""

    dimension = 32

    def __len__(self) -> int:
        return 201

    def search(self, queries: object, k: int) -> list[object]:
        raise RuntimeError("CUDA out of memory")


def test_a_failing_device_is_a_failed_search(model: EncoderSettings) -> None:
    index = DenseIndex(Failing(), corpus(), Encoder(model, "cpu"))  # type: ignore[arg-type]
    with pytest.raises(SearchFailed, match="out of memory"):
        index.search(QUERIES, 3)


def test_a_real_encoder_finds_what_questions_need(tmp_path: Path) -> None:
    passages = {passage.id: passage for passage in mini_corpus(3000)}
    questions = [
        question
        for question in read_questions(DATA / "questions" / "nq.jsonl.gz")
        if question.supporting and all(name in passages for name in question.supporting)
    ][:20]
    needed = dict.fromkeys(name for question in questions for name in question.supporting)
    chosen = dict.fromkeys([*needed, *list(passages)[:120]])
    folder = tmp_path / "index"
    kind = Torch(EncoderSettings(model=str(minilm()), max_tokens=128))
    build_index((passages[name] for name in chosen), folder, kind, BuildOptions())
    found = ids(DenseIndex.open(folder, device="cpu"), [question.text for question in questions])
    hit = [set(question.supporting) <= set(own) for question, own in zip(questions, found, strict=True)]
    assert np.mean(hit) >= 0.9


def test_parts_merged_are_the_whole(built: Path, tmp_path: Path) -> None:
    whole = DenseIndex.open(built, device="cpu")
    folders = split_index(built, 3, tmp_path)
    found = [open_index(folder, device="cpu").search(QUERIES, 7) for folder in folders]
    for i, expected in enumerate(whole.search(QUERIES, 7)):
        merged = sorted((hit for lists in found for hit in lists[i]), key=lambda hit: (-hit.score, hit.passage.id))[:7]
        assert [hit.passage for hit in merged] == [hit.passage for hit in expected]
        assert [hit.score for hit in merged] == [hit.score for hit in expected]
    check_parts(folders)


def test_kinds_that_cannot_be_cut_say_so(model: EncoderSettings, tmp_path: Path) -> None:
    build_index(corpus(), tmp_path / "graph", Faiss(model, "HNSW4"), SMALL)
    with pytest.raises(IndexUnusable, match="only bm25s, torch ones can be cut"):
        split_index(tmp_path / "graph", 2, tmp_path / "parts")
