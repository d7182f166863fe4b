"""Corpora, from their releases to passages that `agentgym_ig.indexes.read_corpus` reads: streamed and resumable."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from agentgym_ig.data.content import passage_key
from agentgym_ig.data.hub import hub_rows, resolve_revision
from agentgym_ig.data.jsonl import BROKEN, Skip, json_line, json_lines, open_bytes
from agentgym_ig.data.manifest import begin_manifest, finished, hand_over, plan_of, read_manifest
from agentgym_ig.data.mediawiki import plain_pages, read_pages
from agentgym_ig.data.passages import WORDS, cut, passage_of, split_contents, undouble, unquote
from agentgym_ig.data.reading import ENDINGS, Row, Rows, file_rows, files_of
from agentgym_ig.data.releases import CORPORA
from agentgym_ig.data.seen import Digests
from agentgym_ig.data.sources import HUB, Source
from agentgym_ig.data.work import KEPT, How, Work, make_rows, working
from agentgym_ig.errors import CorpusError
from agentgym_ig.types import Passage

XML = (".xml", ".xml.bz2", ".xml.gz")
SECTION, BULLET = "Section::::", "BULLET::::"
"""What KILT puts before headings and entries of lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSettings:
    """How to make passages.

    words: of a passage cut from an article. workers: processes that make wiki text plain; what comes out does not
    depend on them. config, split, revision: of a dataset on the hub.
    """

    words: int = WORDS
    drop_duplicates: bool = False
    workers: int = 1
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.words < 1 or self.workers < 1:
            raise ValueError(f"words {self.words} and workers {self.workers} must be 1 or more")


def prepare_corpus(
    kind: str, source: str, out: Path, settings: CorpusSettings | None = None, how: How | None = None
) -> dict[str, Any]:
    """Write the passages of a source, a line of JSON each, with a manifest beside the file. Returns the manifest.

    kind: one of `releases.CORPORA`. source: a file, a folder of files, or `hf:NAME`. `out` ends in .jsonl or .jsonl.gz.

    Raises CorpusError with the place of a row that cannot be used, or when no passage is left; ValueError for names
    that do not exist; FileNotFoundError; HubUnreachable; FileExistsError for what would be written over.
    """
    settings, how = settings or CorpusSettings(), how or How()
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"--out {out}: give a file that ends in .jsonl or .jsonl.gz")
    opened = corpus_source(kind, source, settings)
    kept = {name: value for name, value in asdict(settings).items() if name in ("words", "drop_duplicates")}
    found = begin_manifest("corpus", opened, kept) | {"corpus": kind}
    if how.resume and (made := finished(out, [out], found)):
        return made[out]
    with working(out, [out], plan_of(found), how) as work:
        if work.handed_over:
            return read_manifest(out)
        make_rows(work, opened.rows, Passages(kind, settings, work).make, how)
        if not work.counts[KEPT]:
            raise CorpusError(f"no passage is left of {source}: {work.read} rows read, left out: {dict(work.counts)}")
        return hand_over(work, out, found)


def corpus_source(kind: str, source: str, settings: CorpusSettings) -> Source:
    """Where to read a corpus from. Raises ValueError for a kind that does not exist, and what `prepare_corpus` does."""
    if kind not in CORPORA:
        raise ValueError(f"unknown kind of corpus {kind!r}; choose {', '.join(CORPORA)}")
    licence = CORPORA[kind].licence
    if source.startswith(HUB):
        if kind in ("hotpotqa", "mediawiki"):
            raise ValueError(f"{kind} is not on the hub; download it and give the file ({CORPORA[kind].where})")
        name, config, split = source.removeprefix(HUB), settings.config, settings.split
        revision = resolve_revision(name, settings.revision)
        about: dict[str, Any] = {
            "source": source,
            "config": config,
            "split": split,
            "revision": revision,
            "licence": licence,
        }
        return Source(lambda skip: hub_rows(name, config, split, revision, skip), about, name)
    paths = _paths(Path(source), kind)
    about = {"source": [str(path) for path in paths], "revision": settings.revision, "licence": licence}

    def rows(skip: int) -> Rows:
        left = Skip(skip)
        for path in paths:
            yield from _rows_of(kind, path, left, settings.workers)

    return Source(rows, about, Path(source).name, tuple(paths))


def _paths(source: Path, kind: str) -> list[Path]:
    if kind == "hotpotqa" and source.is_dir():
        found = sorted(source.rglob("*.bz2"))
        if not found:
            raise FileNotFoundError(f"folder {source} holds no .bz2 file; give the one that the archive unpacks to")
        return found
    if source.is_dir():
        return files_of(source, XML if kind == "mediawiki" else ENDINGS)
    if not source.is_file():
        raise FileNotFoundError(f"no file {source}; give a file, a folder of files, or hf:NAME. {CORPORA[kind].where}")
    return [source]


def _rows_of(kind: str, path: Path, skip: Skip, workers: int) -> Rows:
    if kind == "mediawiki":
        unread = (page for page in read_pages(path) if not skip.one())
        yield from ((f"{path}: page {page.title!r}", page._asdict()) for page in plain_pages(unread, workers))
    elif kind == "hotpotqa":
        yield from _abstracts(path, skip)
    else:
        yield from file_rows(path, skip)


def _abstracts(path: Path, skip: Skip) -> Rows:
    """Lines of the `.bz2` files in a tar archive, which is read in one go from front to end, or of one such file."""
    if not path.name.endswith((".tar.bz2", ".tar.gz", ".tar")):
        with open_bytes(path) as lines:
            yield from ((f"{path}:{number}", row) for number, row in json_lines(lines, str(path), skip))
        return
    import bz2

    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                packed = archive.extractfile(member) if member.name.endswith(".bz2") else None
                if packed is not None:
                    name = f"{path}({member.name})"
                    with bz2.open(packed) as lines:
                        rows = json_lines(cast("Any", lines), name, skip)
                        yield from ((f"{name}:{number}", row) for number, row in rows)
    except (tarfile.TarError, *BROKEN) as error:
        raise CorpusError(f"{path}: {error}") from error


class Passages:
    """Rows of a source to passages."""

    def __init__(self, kind: str, settings: CorpusSettings, work: Work) -> None:
        self._of: Callable[[Row, int], Iterable[Passage]] = KINDS[kind]
        self._settings, self._work = settings, work
        self._seen = Digests()
        if settings.drop_duplicates:
            for line in work.lines():
                row = orjson.loads(line)
                self._seen.add(passage_key(row["title"], row["text"]))

    def make(self, row: Row) -> list[bytes]:
        """The lines of a row; a row with none, and a passage that stood before, are counted."""
        if row.get("why"):
            self._work.counts[row["why"]] += 1
            return []
        passages = list(self._of(row, self._settings.words))
        if not passages:
            self._work.counts["empty"] += 1
        return [
            json_line({"id": passage.id, "title": passage.title, "text": passage.text})
            for passage in passages
            if self._is_new(passage)
        ]

    def _is_new(self, passage: Passage) -> bool:
        if not self._settings.drop_duplicates:
            return True
        new = self._seen.add(passage_key(passage.title, passage.text))
        self._work.counts["duplicate"] += not new
        return new


def _wiki18(row: Row, words: int) -> Iterator[Passage]:
    line, _, text = str(row["contents"]).partition("\n")
    title = unquote(line.strip())
    if title == line.strip():  # not as a CSV field: quotes inside that are not doubled, or none at all
        title, _ = split_contents(line)
    yield passage_of({"id": row["id"], "title": title, "text": undouble(text)})


def _as_it_is(row: Row, words: int) -> Iterator[Passage]:
    yield passage_of(row)


def _article(row: Row, words: int) -> Iterator[Passage]:
    if row["id"] is None or not str(row["id"]).strip():
        raise ValueError("an article has no id")
    return cut(str(row["id"]), str(row["title"]), str(row["text"] or ""), words)


def _abstract(row: Row, words: int) -> Iterator[Passage]:
    sentences = row["text"]
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise ValueError("text is no list of sentences: take the archive of the abstracts, not that of whole articles")
    text = " ".join(" ".join(sentences).split())
    if text:
        yield Passage(str(row["id"]), str(row["title"]), text)


def _kilt(row: Row, words: int) -> Iterator[Passage]:
    title, text = str(row["wikipedia_title"]), row["text"]
    paragraphs = text["paragraph"] if isinstance(text, dict) else text
    kept = [str(own).strip().removeprefix(BULLET) for own in paragraphs if not str(own).startswith(SECTION)]
    if kept and kept[0] == title:  # the first paragraph is the title once more
        kept = kept[1:]
    return cut(str(row.get("wikipedia_id") or row.get("_id") or title), title, " ".join(kept), words)


KINDS: Mapping[str, Callable[[Row, int], Iterable[Passage]]] = {
    "wiki18": _wiki18,
    "hotpotqa": _abstract,
    "dpr": _as_it_is,
    "kilt": _kilt,
    "articles": _article,
    "passages": _as_it_is,
    "mediawiki": _article,
}
"""Kind of corpus → how a row of it becomes passages."""
