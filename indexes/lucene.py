"""BM25 with Lucene, through the Anserini that pyserini brings: the index for a corpus as large as Wikipedia.

It is built in little memory, and the cost of a query grows more slowly than the corpus. Any index that Anserini or
pyserini made can be opened as well. Java is called directly, so pyserini itself is never imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from agentgym_ig.data.passages import join_contents, split_contents
from agentgym_ig.errors import BuildFailed, IndexUnusable, SearchFailed
from agentgym_ig.indexes.base import check_k, make_hit
from agentgym_ig.indexes.build import Work, link_or_copy
from agentgym_ig.indexes.jvm import HEAP, java
from agentgym_ig.indexes.manifest import read_manifest
from agentgym_ig.indexes.store import PassageStore
from agentgym_ig.text import clean
from agentgym_ig.types import Hit, Passage

BUILD_HEAP = 512 << 20
"""Bytes that Java's heap may grow to in a build."""
LIBRARY_MEMORY = 400 << 20
"""Bytes that Python with one shard, and Java beside its heap, take in a build, about."""
BUFFER_MB = 128
"""What Lucene may keep in memory of a shard before it writes; a shard of 20,000 passages takes a fifth of that."""
TOGETHER = 256
"""Queries given to Lucene at once: enough for all cores, and other threads need not wait long."""


@dataclass(frozen=True, kw_only=True)
class Lucene:
    """What the index depends on beside its passages; the `Kind` that builds it.

    Words are what Anserini's English analyzer makes of a text: lower case, Porter's stemmer, Lucene's 33 stop words.
    """

    k1: float = 0.9
    """Term-frequency saturation (Anserini's default). Used when searching: any value suits any index."""
    b: float = 0.4
    """Length normalisation (Anserini's default); likewise."""

    name = "lucene"

    def __post_init__(self) -> None:
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise ValueError(f"k1={self.k1}, b={self.b}: k1 must be at least 0 and b between 0 and 1")

    def describe(self) -> dict[str, Any]:
        """See `Kind.describe`."""
        return asdict(self)

    def versions(self) -> dict[str, str]:
        """See `Kind.versions`."""
        return {"pyserini": version("pyserini")}

    def memory_needed(self, count: int, sample: Path) -> int:
        """See `Kind.memory_needed`. Java's heap has a bound, and the corpus passes through it shard by shard."""
        return LIBRARY_MEMORY + BUILD_HEAP + 8 * count

    def check(self, count: int, memory: int) -> None:
        """See `Kind.check`."""
        needed = self.memory_needed(count, Path())
        if memory < needed:
            raise BuildFailed(f"{memory >> 20} MB are not enough for Lucene; allow {(needed >> 20) + 1} MB or more")

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        """See `Kind.digest`: a Lucene index of the shard, by Anserini's own indexer."""
        lines = [
            orjson.dumps(
                {"id": passage.id, "contents": join_contents(passage.title, passage.text)},
                option=orjson.OPT_APPEND_NEWLINE,
            )
            for passage in passages
        ]
        (folder / "contents").mkdir()
        (folder / "contents" / "contents.jsonl").write_bytes(b"".join(lines))
        content = hashlib.sha256(b"".join(lines)).digest()
        with _building(folder) as jnius, _ids_from(jnius, content):
            arguments = jnius.autoclass("io.anserini.index.IndexCollection$Args")()
            arguments.collectionClass = "JsonCollection"
            arguments.generatorClass = "DefaultLuceneDocumentGenerator"
            arguments.input, arguments.index = str(folder / "contents"), str(folder / "lucene")
            arguments.threads = 1  # in the order of the passages
            arguments.memoryBuffer = BUFFER_MB
            arguments.quiet = True
            jnius.autoclass("io.anserini.index.IndexCollection")(arguments).run()
            # It prints its errors and goes on, so only what lies there counts.
            indexed = _commit(jnius, _directory(jnius, folder / "lucene")).totalMaxDoc()
        if indexed != len(passages):
            raise BuildFailed(f"Lucene took {indexed} of {len(passages)} passages into {folder}; it has said why above")
        shutil.rmtree(folder / "contents")
        (folder / "content").write_bytes(content)

    def assemble(self, work: Work, folder: Path) -> None:
        """See `Kind.assemble`: all shards in one segment, whose document numbers are the rows of the passages."""
        out = folder / "lucene"
        shutil.rmtree(out, ignore_errors=True)
        content = hashlib.sha256(b"".join((shard / "content").read_bytes() for shard in work.shards)).digest()
        work.progress("merging", 0, len(work.passages))
        with _building(out) as jnius, _ids_from(jnius, content):
            _merge(jnius, [shard / "lucene" for shard in work.shards], out)
            _forget_origin(jnius, out)
        (out / "write.lock").unlink()
        rows = range(0, len(work.passages), work.passages.shard)
        LuceneIndex(out, self, work.passages).check_rows((*rows, len(work.passages) - 1))
        work.progress("merging", len(work.passages), len(work.passages))


@dataclass(frozen=True, kw_only=True)
class LuceneFiles(Lucene):
    """Lucene files that somebody else made without the texts in them, and the corpus they were made of."""

    path: Path

    def describe(self) -> dict[str, Any]:
        """See `Kind.describe`."""
        return {"k1": self.k1, "b": self.b, "imported": self.path.name}

    def digest(self, passages: Sequence[Passage], folder: Path, progress: Callable[[int], None]) -> None:
        """See `Kind.digest`. The files are there already."""

    def assemble(self, work: Work, folder: Path) -> None:
        """See `Kind.assemble`. Raises IndexUnusable when files and corpus do not belong together."""
        out = folder / "lucene"
        out.mkdir(exist_ok=True)
        for path in self.path.iterdir():
            if path.name != "write.lock":
                link_or_copy(path, out / path.name)
        LuceneIndex(out, self, work.passages).search(["the", work.passages[0].title, work.passages[0].text[:200]], 10)


@contextmanager
def _building(folder: Path) -> Iterator[Any]:
    try:
        with java(f"building {folder}", BuildFailed, BUILD_HEAP) as jnius:
            yield jnius
    except BuildFailed as error:
        raise BuildFailed(f"{error}. What was built so far is kept: run the same command again") from error


@contextmanager
def _ids_from(jnius: Any, content: bytes) -> Iterator[None]:
    """Let Lucene count the ids of its files up from a hash of the passages, not from where the system's dice fell."""
    # Without private members, to be another class than pyjnius's own Field, which can neither get nor set.
    field_class = jnius.autoclass("java.lang.reflect.Field", include_private=False)
    source = jnius.autoclass("java.lang.Class").forName("org.apache.lucene.util.StringHelper")
    next_id = jnius.cast(field_class, source.getDeclaredField("nextId"))
    next_id.setAccessible(True)
    before = next_id.get(None)
    next_id.set(None, jnius.autoclass("java.math.BigInteger")(str(int.from_bytes(content[:16], "big"))))
    try:
        yield
    finally:
        next_id.set(None, before)


def _directory(jnius: Any, folder: Path) -> Any:
    path = jnius.autoclass("java.io.File")(str(folder)).toPath()
    return jnius.autoclass("org.apache.lucene.store.FSDirectory").open(path)


def _commit(jnius: Any, directory: Any) -> Any:
    return jnius.autoclass("org.apache.lucene.index.SegmentInfos").readLatestCommit(directory)


def _merge(jnius: Any, shards: Sequence[Path], out: Path) -> None:
    policy = jnius.autoclass("org.apache.lucene.index.LogDocMergePolicy")()  # keeps the order
    policy.setMergeFactor(max(2, len(shards)))  # all of them in one go
    policy.setNoCFSRatio(0.0)
    config = jnius.autoclass("org.apache.lucene.index.IndexWriterConfig")()
    config.setMergePolicy(policy)
    config.setMergeScheduler(jnius.autoclass("org.apache.lucene.index.SerialMergeScheduler")())
    with _directory(jnius, out) as directory:
        writer = jnius.autoclass("org.apache.lucene.index.IndexWriter")(directory, config)
        try:
            writer.addIndexes(*[_directory(jnius, shard) for shard in shards])
            writer.forceMerge(1)
            writer.commit()
        finally:
            writer.close()


def _forget_origin(jnius: Any, folder: Path) -> None:
    """Take out of the segment's description when, where and how it was written; Lucene makes no use of it."""
    with _directory(jnius, folder) as directory:
        infos = _commit(jnius, directory)
        (found,) = (infos.info(number).info for number in range(infos.size()))
        kept = jnius.autoclass("java.util.HashMap")()
        # Anserini looks for this to learn whether it can break ties by id.
        kept.put("lucene.version", found.getDiagnostics().get("lucene.version"))
        clean = jnius.autoclass("org.apache.lucene.index.SegmentInfo")(
            directory, found.getVersion(), found.getMinVersion(), found.name, found.maxDoc(), False,
            found.getHasBlocks(), found.getCodec(), kept, found.getId(), found.getAttributes(), None,
        )  # fmt: skip
        clean.setFiles(found.files())
        directory.deleteFile(f"{found.name}.si")
        context = jnius.autoclass("org.apache.lucene.store.IOContext").DEFAULT
        found.getCodec().segmentInfoFormat().write(directory, clean, context)
        directory.sync(jnius.autoclass("java.util.Arrays").asList(f"{found.name}.si"))


class LuceneIndex:
    """An `Index` over BM25 scores by Lucene. Build one with `build_index` and the kind `Lucene`; `open` opens any.

    Scores are Lucene's own; pyserini shows them rounded to four digits, and takes a little off where two are equal.
    Threads may share an index.

    Args:
        folder: of Lucene's own files.
        settings: how to score.
        passages: what the index was built over; where None is given, Lucene itself must have stored it.
        heap: bytes that Java's heap may grow to, where this is what starts it.
    """

    def __init__(
        self, folder: Path, settings: Lucene, passages: PassageStore | None = None, *, heap: int = HEAP
    ) -> None:
        self.settings = settings
        self.corpus_sha256: str | None = None
        self.folder, self._store = folder, passages
        with java(f"opening {folder}", IndexUnusable, heap) as jnius:
            jnius.autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2**31 - 1)  # for long queries
            self.searcher = jnius.autoclass("io.anserini.search.SimpleSearcher")(str(folder))
            self.searcher.set_bm25(float(settings.k1), float(settings.b))
            self.searcher.cascade.rerankers.clear()  # there is one, which rounds the scores
            # So Anserini calls an index from before it kept ids to sort by; newer versions cannot open one at all.
            self.ties_by_chance: bool = getattr(self.searcher, "backwardsCompatibilityLucene8", False)
            self._size: int = self.searcher.get_total_num_docs()
            self._look_at_texts()
        self._in_step = False

    def _look_at_texts(self) -> None:
        if self._store is None and self._size and _stored_text(self.searcher.doc(0)) is None:
            raise IndexUnusable(
                f"{self.folder} holds no texts (neither `raw` nor `contents` is stored); open it together with its "
                f"passages: LuceneIndex.open(folder, passages=PassageStore(...))"
            )
        if self._store is not None and len(self._store) != self._size:
            raise IndexUnusable(
                f"{self.folder} holds {self._size:,} documents, but {len(self._store):,} passages belong to it; "
                "give those that it was built over"
            )

    def check_rows(self, rows: Iterable[int]) -> None:
        """Raise IndexUnusable where a document's number in Lucene is not the row of its passage."""
        with java(f"reading {self.folder}", IndexUnusable):
            for row in rows:
                found = self.searcher.doc(row).get("id")
                if self._store is None or found != self._store[row].id:
                    raise IndexUnusable(f"document {row} of {self.folder} is {found!r}, not its passage; build it anew")

    @classmethod
    def open(
        cls,
        folder: Path,
        settings: Lucene | None = None,
        *,
        passages: PassageStore | None = None,
        heap: int = HEAP,
    ) -> LuceneIndex:
        """Open an index that we built, or a folder of Lucene files that Anserini or pyserini made.

        Where Lucene did not store the texts, as pyserini does without `--storeRaw`, give the `passages`: in the order
        in which they were indexed, or such that their ids are their row numbers.

        Raises IndexUnusable when the folder holds no such index, or one without texts, and JavaMissing.
        """
        if next(folder.glob("segments_*"), None) is not None:
            return cls(folder, settings or Lucene(), passages, heap=heap)
        manifest = read_manifest(folder, Lucene.name)
        store = PassageStore(folder, manifest["shard"])
        index = cls(
            folder / "lucene",
            settings or Lucene(k1=manifest["settings"]["k1"], b=manifest["settings"]["b"]),
            store,
            heap=heap,
        )
        index.check_rows((0, len(index) - 1))
        index._in_step, index.corpus_sha256 = True, manifest["corpus_sha256"]
        return index

    def __len__(self) -> int:
        return self._size

    def passages(self) -> Iterator[Passage]:
        """All passages, in the order in which they were indexed."""
        if self._store is not None:
            yield from self._store
            return
        for row in range(self._size):
            with java(f"reading {self.folder}", SearchFailed):
                passage = _stored(self.searcher.doc(row))
            yield passage

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """See `Index.search`. A query is a bag of words: no character in it has a meaning of its own."""
        check_k(k)
        asked = list(map(clean, queries))
        k = max(min(k, self._size), 1)
        found: list[list[Hit]] = []
        for start in range(0, len(asked), TOGETHER):
            with java(f"searching {self.folder}", SearchFailed) as jnius:
                together = asked[start : start + TOGETHER]
                documents = self._search(jnius, together, k + self.ties_by_chance)
                if self.ties_by_chance:
                    documents = [self._beyond_ties(*one, k) for one in zip(together, documents, strict=True)]
                found += [self._hits(of_query, k) for of_query in documents]
        return found

    def _search(self, jnius: Any, queries: Sequence[str], k: int) -> list[Any]:
        """For each query Anserini's documents."""
        if len(queries) == 1:
            return [self.searcher.search(queries[0], k)]
        names = [str(number) for number in range(len(queries))]
        as_list = jnius.autoclass("java.util.Arrays").asList
        found = self.searcher.batch_search(as_list(*queries), as_list(*names), k, os.cpu_count() or 1)
        return [found.get(name) for name in names]

    def _beyond_ties(self, query: str, documents: Any, k: int) -> Any:
        """So many documents that the last scores less than the k-th, or all that match."""
        asked = k + 1
        while len(documents) == asked and documents[-1].score == documents[k - 1].score:
            asked *= 2
            documents = self.searcher.search(query, min(asked, self._size))
        return documents

    def _hits(self, documents: Any, k: int) -> list[Hit]:
        if self._store is not None and self._in_step:
            passages = [self._store[document.lucene_docid] for document in documents]
        else:
            passages = [self._passage(document) for document in documents]
        hits = [make_hit((passage, document.score)) for passage, document in zip(passages, documents, strict=True)]
        hits.sort(key=lambda hit: (-hit.score, hit.passage.id))
        return hits[:k]

    def _passage(self, document: Any) -> Passage:
        if self._store is None:
            return _stored(document.lucene_document)
        name: str = document.docid
        for row in (document.lucene_docid, int(name) if name.isdecimal() else -1):
            if 0 <= row < self._size and self._store[row].id == name:
                return self._store[row]
        raise SearchFailed(
            f"document {name!r} of {self.folder} is neither in the order of the passages that it was opened with, nor "
            "named after its row; give the passages that it was built over, in that order"
        )


def _stored_text(document: Any) -> str | None:
    """What Lucene stored of a document: Anserini's `raw`, or its `contents`."""
    found: str | None = document.get("raw") or document.get("contents")
    return found


def _stored(document: Any) -> Passage:
    """The passage in a document: a JSON object with `contents` or `text`, or plain text, with the title on line 1."""
    text = _stored_text(document) or ""
    title = ""
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    if isinstance(row, dict):
        title, text = str(row.get("title") or ""), str(row.get("text") or "")
        if not text:
            text = str(row.get("contents") or "")
    if not title and "\n" in text:
        title, text = split_contents(text)
    return Passage(document.get("id"), title, text)
