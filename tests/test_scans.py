"""Flat scans equal the NumPy scan bit for bit; the others find most of what it finds. Vectors only, no encoder."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agentgym_ig import Passage
from agentgym_ig.indexes.build import Work
from agentgym_ig.indexes.dense import DenseIndex, auto_factory
from agentgym_ig.indexes.embedded import open_vectors
from agentgym_ig.indexes.faiss_build import fill_index, make_index, memory_of, search_parameters, with_refine
from agentgym_ig.indexes.faiss_scan import FaissScan
from agentgym_ig.indexes.scans import Candidates, Extent, Scan, TorchScan, exact_search, on_devices
from agentgym_ig.indexes.store import store_passages

Vectors = NDArray[np.float32]


def numpy_scan(vectors: Vectors, queries: Vectors, ids: Sequence[str], k: int) -> list[list[tuple[str, float]]]:
    """What is right: every score in double precision, rounded once; the best k, equal scores by id."""
    found = []
    for query in queries:
        scores = np.vecdot(vectors.astype(np.float64), query.astype(np.float64)).astype(np.float32)
        order = sorted(range(len(vectors)), key=lambda row: (-scores[row], ids[row]))
        found.append([(ids[row], float(scores[row])) for row in order[:k]])
    return found


class Given:
    """An encoder whose queries are the numbers of the vectors that it was given."""

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors

    def queries(self, given: Sequence[str]) -> Vectors:
        return self._vectors[[int(number) for number in given]]


def hits(scan: Scan, queries: Vectors, ids: Sequence[str], k: int, batch: int = 1000) -> list[list[tuple[str, float]]]:
    """The same through the index, some queries at a time."""
    passages = [Passage(name, "", "") for name in ids]
    index = DenseIndex(scan, passages, Given(queries))  # type: ignore[arg-type]
    numbers = [str(number) for number in range(len(queries))]
    found = [index.search(numbers[low : low + batch], k) for low in range(0, len(numbers), batch)]
    return [[(hit.passage.id, hit.score) for hit in own] for some in found for own in some]


def flat_faiss(vectors: Vectors) -> FaissScan:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return FaissScan(index, Extent.of(iter([vectors])), "cpu")


def flat_torch(vectors: Vectors, device: str = "cpu") -> TorchScan:
    half = vectors.astype(np.float16)
    kept: NDArray[Any] = half if (half == vectors).all() else vectors
    cut = max(len(vectors) // 3, 1)
    shards = [kept[low : low + cut].copy() for low in range(0, len(kept), cut)]
    return TorchScan(shards, Extent.of(iter([vectors])), device)


def clustered(count: int, dimension: int, seed: int = 0) -> Vectors:
    """Unit vectors around a hundred centres, as float16 holds them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((100, dimension))
    vectors = centres[rng.integers(0, 100, count)] + 0.5 * rng.standard_normal((count, dimension))
    unit: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    return unit


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Vectors, Vectors, list[str]]:
    """Vectors with many duplicates and near duplicates, queries, and ids in an order of their own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dimension = draw(st.integers(1, 40))
    kinds = draw(st.integers(1, 30))
    if draw(st.booleans()):
        different = rng.integers(-2, 3, (kinds, dimension)) / 8
    else:
        different = rng.standard_normal((kinds, dimension)) * 10.0 ** draw(st.integers(-3, 3))
    vectors = different[rng.integers(0, kinds, draw(st.integers(1, 300)))].astype(np.float32)
    if draw(st.booleans()):
        vectors *= 1 + rng.integers(0, 2, vectors.shape).astype(np.float32) * np.float32(2**-22)
    if draw(st.booleans()):
        vectors = vectors.astype(np.float16).astype(np.float32)
    queries = rng.standard_normal((draw(st.integers(1, 64)), dimension)).astype(np.float32)
    queries[0] = vectors[0]
    ids = [f"p{number}" for number in rng.permutation(len(vectors))]
    return vectors, queries, ids


@settings(max_examples=60, deadline=None)
@given(corpora(), st.integers(1, 320), st.integers(1, 64))
def test_flat_scans_equal_the_numpy_scan(made: tuple[Vectors, Vectors, list[str]], k: int, batch: int) -> None:
    vectors, queries, ids = made
    wanted = numpy_scan(vectors, queries, ids, k)
    assert hits(flat_faiss(vectors), queries, ids, k, batch) == wanted
    assert hits(flat_torch(vectors), queries, ids, k, batch) == wanted


@pytest.mark.parametrize("make", [flat_faiss, flat_torch])
def test_hundreds_of_equal_passages_come_in_the_order_of_their_ids(make: Any) -> None:
    vectors = clustered(2000, 24)
    vectors[100:900] = vectors[100]
    ids = [f"p{number:04d}" for number in np.random.default_rng(1).permutation(2000)]
    queries = vectors[[100, 5, 1500]]
    scan = make(vectors)
    for k in (1, 10, 799, 800, 801, 5000):
        assert hits(scan, queries, ids, k) == numpy_scan(vectors, queries, ids, k)


def test_the_result_does_not_depend_on_the_batch() -> None:
    vectors, queries = clustered(9000, 64), clustered(64, 64, seed=1)
    ids = [f"p{number}" for number in range(len(vectors))]
    for scan in (flat_faiss(vectors), flat_torch(vectors)):
        whole = hits(scan, queries, ids, 10)
        assert whole == numpy_scan(vectors, queries, ids, 10)
        for batch in (1, 7, 19, 20, 33):
            assert hits(scan, queries, ids, 10, batch) == whole


@pytest.mark.parametrize("lossless", [True, False])
def test_products_in_float16_find_the_exact_nearest(lossless: bool) -> None:
    """What GPUs compute: queries, and vectors that were not so before, rounded to float16."""
    vectors, queries = clustered(3000, 48), np.random.default_rng(2).standard_normal((20, 48)).astype(np.float32)
    if not lossless:
        vectors = vectors * np.float32(1.0001)
    extent = Extent.of(iter([vectors]))
    assert extent.float16 == lossless
    rounded = vectors.astype(np.float16).astype(np.float32)

    def nearest(some: Vectors, asked: int) -> tuple[Vectors, NDArray[np.int64]]:
        scores = some.astype(np.float16).astype(np.float32) @ rounded.T
        rows = np.argsort(-scores, axis=1)[:, :asked]
        return np.take_along_axis(scores, rows, axis=1), rows

    among = Candidates(nearest, vectors.__getitem__, len(vectors))
    found = exact_search(queries, 10, among, extent.slack(queries, half=True))
    ids = [f"{row:05d}" for row in range(len(vectors))]
    assert [
        [(ids[row], float(score)) for row, score in zip(rows, scores, strict=True)][:10] for rows, scores in found
    ] == numpy_scan(vectors, queries, ids, 10)


def test_vectors_are_shared_out_among_devices_in_order() -> None:
    files = [(first, torch.full((5, 2), float(first))) for first in range(0, 35, 5)]
    for devices in (1, 2, 3, 7, 9):
        parts = on_devices(files, ["cpu"] * devices)
        assert torch.cat([part for _, part in parts]).tolist() == torch.cat([own for _, own in files]).tolist()
        assert [first for first, _ in parts] == np.cumsum([0, *(len(part) for _, part in parts[:-1])]).tolist()
        assert len(parts) == min(devices, 7)
        assert all(part.dtype == torch.float16 for _, part in parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scans_on_gpus_equal_the_numpy_scan() -> None:
    vectors, queries = clustered(30_000, 64), clustered(300, 64, seed=1)
    vectors[100:900] = vectors[100]
    queries[7] = vectors[100]
    ids = [f"p{number:05d}" for number in range(len(vectors))]
    wanted = numpy_scan(vectors, queries, ids, 10)
    assert hits(flat_torch(vectors, "cuda"), queries, ids, 10) == wanted
    assert hits(flat_torch(vectors * np.float32(1.0001), "cuda:0"), queries, ids, 10) == numpy_scan(
        vectors * np.float32(1.0001), queries, ids, 10
    )
    if faiss.get_num_gpus():
        index = faiss.IndexFlatIP(64)
        index.add(vectors)
        scan = FaissScan(index, Extent.of(iter([vectors])))
        assert scan.on_gpu
        assert hits(scan, queries, ids, 10) == wanted


@pytest.mark.parametrize(
    ("factory", "least"),
    [("HNSW16", 0.95), ("IVF32,Flat", 0.95), ("IVF32,SQ8", 0.93), ("SQfp16", 1.0), ("SQ8", 0.95), ("IVF32,PQ16x4", 0.8),
     ("PQ16x4fs", 0.8), ("RaBitQ", 0.8), ("PCAR16,IVF32,SQ8,RFlat", 0.8)],
)  # fmt: skip
def test_other_indexes_find_most_of_the_nearest(tmp_path: Path, factory: str, least: float) -> None:
    vectors, queries = clustered(4000, 32), clustered(50, 32, seed=1)
    ids = [f"p{number:04d}" for number in range(len(vectors))]
    index = fill_index(make_index(factory, 32), [vectors.astype(np.float16)], work(tmp_path))
    found = hits(FaissScan(index, parameters=search_parameters(index)), queries, ids, 10)
    wanted = numpy_scan(vectors, queries, ids, 10)
    shared = [
        len({name for name, _ in own} & {name for name, _ in right}) for own, right in zip(found, wanted, strict=True)
    ]
    assert np.mean(shared) / 10 >= least
    assert all(own == sorted(own, key=lambda hit: (-hit[1], hit[0])) for own in found)


def test_ties_in_an_index_with_scores_of_its_own_go_by_id(tmp_path: Path) -> None:
    vectors = clustered(1000, 16)
    vectors[200:500] = vectors[200]
    ids = [f"p{number:04d}" for number in np.random.default_rng(3).permutation(1000)]
    index = fill_index(make_index("IVF4,SQ8", 16), [vectors], work(tmp_path))
    scan = FaissScan(index, parameters="nprobe=4")
    for k in (1, 5, 299, 300):
        assert [name for name, _ in hits(scan, vectors[200:201], ids, k)[0]] == sorted(ids[200:500])[:k]
    assert len(hits(scan, vectors[:1], ids, 5000)[0]) == 1000


def work(folder: Path, progress: Any = lambda phase, done, total: None) -> Work:
    store, _ = store_passages(folder, [Passage("p", "", "a")], 1, lambda done: None)
    return Work(folder, [], store, 1 << 30, progress)


@pytest.mark.parametrize("factory", ["HNSW8", "HNSW8,SQ8", "IVF8_HNSW4,SQ8", "PCA8,IVF8,PQ4x4", "Flat"])
def test_a_stopped_build_of_a_graph_goes_on_to_the_same_graph(tmp_path: Path, factory: str) -> None:
    shards = [clustered(500, 16, seed).astype(np.float16) for seed in range(6)]
    (tmp_path / "whole").mkdir()
    whole = fill_index(make_index(factory, 16), shards, work(tmp_path / "whole"))
    added = 0

    def stopping(phase: str, done: int, total: int | None) -> None:
        nonlocal added
        added += phase == "adding"
        if phase == "adding" and added % 3 == 2:
            raise KeyboardInterrupt

    (tmp_path / "stopped").mkdir()
    for _ in range(10):
        try:
            index = fill_index(make_index(factory, 16), shards, work(tmp_path / "stopped", stopping), save_every_s=0.0)
            break
        except KeyboardInterrupt:
            continue
    assert added > 6
    assert index.ntotal == 3000
    np.testing.assert_array_equal(faiss.serialize_index(index), faiss.serialize_index(whole))


def test_a_corpus_smaller_than_the_number_of_lists_can_be_indexed(tmp_path: Path) -> None:
    vectors = clustered(20, 16)
    ids = [f"p{number:02d}" for number in range(20)]
    index = fill_index(make_index("IVF64,PQ4x4", 16), [vectors], work(tmp_path))
    found = hits(FaissScan(index, parameters="nprobe=64,k_factor_rf=20"), vectors, ids, 1)
    assert [own[0][0] for own in found] == ids


def test_factories() -> None:
    assert auto_factory(1_000_000) == "Flat"
    assert auto_factory(1_000_001) == "IVF4096,SQ8"
    assert auto_factory(21_015_324) == "IVF16384,SQ8"
    assert with_refine("IVF64,PQ48") == "IVF64,PQ48,Refine(SQfp16)"
    assert with_refine("OPQ16,IVF64,PQ16x4fs,RFlat") == "OPQ16,IVF64,PQ16x4fs,RFlat"
    assert with_refine("IVF64,SQ8") == "IVF64,SQ8"
    with pytest.raises(ValueError, match="FAISS knows no index 'Flut'"):
        make_index("Flut", 16)
    assert search_parameters(make_index("IVF64_HNSW8,PQ4", 16)) == "k_factor_rf=32,nprobe=64,quantizer_efSearch=128"
    assert search_parameters(make_index("HNSW8,SQ8", 16)) == "efSearch=128"
    million = {
        factory: memory_of(make_index(factory, 384), 1_000_000) >> 20 for factory in ("Flat", "IVF64,SQ8", "HNSW32")
    }
    assert 1464 < million["Flat"] < 1600  # 1,536 MB are the vectors themselves
    assert 366 < million["IVF64,SQ8"] < 800
    assert 1744 < million["HNSW32"] < 2200


def test_parameters_that_an_index_does_not_have_are_refused() -> None:
    index = faiss.index_factory(8, "Flat", faiss.METRIC_INNER_PRODUCT)
    with pytest.raises(ValueError, match="'nprobe=3' do not fit"):
        FaissScan(index, parameters="nprobe=3")


def test_a_disk_that_takes_no_more_loses_no_index(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys, faiss, numpy as np; from pathlib import Path\n"
        "from agentgym_ig.indexes.faiss_build import write_index\n"
        "index = faiss.IndexFlatIP(8); index.add(np.ones((1000, 8), np.float32))\n"
        "write_index(index, Path(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: write_index(index, Path(sys.argv[1]))\n"
        "except OSError as error: print(error.errno)"
    )
    path = tmp_path / "index.faiss"
    run = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "27"  # EFBIG: the limit of this test in place of a full disk
    assert faiss.read_index(str(path)).ntotal == 1000


def test_vectors_are_read_as_they_are_needed(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.npy" for number in range(3)]
    for number, path in enumerate(paths):
        np.save(path, clustered(50, 8, number).astype(np.float16))
    opened = open_vectors(paths)
    assert all(isinstance(own, np.memmap) for own in opened)
    assert len(TorchScan(opened, Extent(8, 1.0, True))) == 150
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        open_vectors([tmp_path / "objects.npy"])
    assert os.path.getsize(paths[0]) == 50 * 8 * 2 + 128
