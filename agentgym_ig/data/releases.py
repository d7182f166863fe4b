"""Where the question sets and corpora are published, in which layout, and under which licence.

Names, configurations and fields are as read in the releases' own cards, files and the scripts that load them; the hub
was not at hand when this was written, so no revision is pinned: the one that is loaded is looked up and noted in the
manifest, and `--revision` takes it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

EVALUATION_ORDER = ("test", "dev", "train")
"""Search-R1's rule: the first of these splits that there is."""


@dataclass(frozen=True, slots=True)
class Release:
    """One place on the hub that has a dataset.

    splits: our name of a split → the hub's. rows: split → how many rows it is said to have.
    """

    repository: str
    config: str | None
    layout: str
    licence: str
    splits: Mapping[str, str]
    rows: Mapping[str, int] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """A question set. releases: name → where it is published, the one to take first.

    mixed: its rows come from several datasets and keep their names.
    """

    licence: str
    releases: Mapping[str, Release]
    mixed: bool = False


def _flashrag(config: str, licence: str, **rows: int) -> Release:
    splits = {name: name for name in rows}
    card = f"{licence}; the collection's card says cc-by-sa-4.0"
    return Release("RUC-NLPIR/FlashRAG_datasets", config, "flashrag", card, splits, rows)


def _original(where: str, layout: str, licence: str, splits: Mapping[str, str], **rows: int) -> Release:
    repository, _, config = where.partition(":")
    return Release(repository, config or None, layout, licence, splits, rows)


_TRAIN_DEV = {"train": "train", "dev": "validation"}
_NQ = "CC BY-SA 3.0"
_TRIVIAQA = "unknown (the hub card says so)"
_POPQA = "MIT (the authors' repository; the hub card states none)"
_HOTPOTQA = "CC BY-SA 4.0"
_TWO_WIKI = "Apache-2.0"
_MUSIQUE = "CC BY 4.0"
_BAMBOOGLE = "MIT"
_WIKIPEDIA = "CC BY-SA (Wikipedia's text)"

DATASETS: Mapping[str, Dataset] = {
    "nq": Dataset(
        _NQ,
        {
            "flashrag": _flashrag("nq", _NQ, train=79_168, dev=8_757, test=3_610),
            "original": _original(
                "google-research-datasets/nq_open", "question_answer", _NQ, _TRAIN_DEV, train=87_925, dev=3_610
            ),
        },
    ),
    "triviaqa": Dataset(
        _TRIVIAQA,
        {
            "flashrag": _flashrag("triviaqa", _TRIVIAQA, train=78_785, dev=8_837, test=11_313),
            "original": _original("mandarjoshi/trivia_qa:rc.nocontext", "triviaqa_hub", _TRIVIAQA, _TRAIN_DEV),
        },
    ),
    "popqa": Dataset(
        _POPQA,
        {
            "flashrag": _flashrag("popqa", _POPQA, test=14_267),
            "original": _original("akariasai/PopQA", "popqa", _POPQA, {"test": "test"}, test=14_267),
        },
    ),
    "hotpotqa": Dataset(
        _HOTPOTQA,
        {
            "flashrag": _flashrag("hotpotqa", _HOTPOTQA, train=90_447, dev=7_405),
            "original": _original(
                "hotpotqa/hotpot_qa:distractor", "hotpotqa", _HOTPOTQA, _TRAIN_DEV, train=90_447, dev=7_405
            ),
        },
    ),
    "2wikimultihopqa": Dataset(
        _TWO_WIKI,
        {
            "flashrag": _flashrag("2wikimultihopqa", _TWO_WIKI, train=15_000, dev=12_576),
            "original": _original("xanhho/2WikiMultihopQA", "2wikimultihopqa", _TWO_WIKI, _TRAIN_DEV, dev=12_576),
        },
    ),
    "musique": Dataset(
        _MUSIQUE,
        {
            "flashrag": _flashrag("musique", _MUSIQUE, train=19_938, dev=2_417),
            "original": _original("dgslibisey/MuSiQue", "musique", _MUSIQUE, _TRAIN_DEV, train=19_938, dev=2_417),
        },
    ),
    "bamboogle": Dataset(
        _BAMBOOGLE,
        {
            "flashrag": _flashrag("bamboogle", _BAMBOOGLE, test=125),
            "original": _original("chiayewken/bamboogle", "bamboogle", _BAMBOOGLE, {"test": "test"}, test=125),
        },
    ),
    "nq_hotpotqa_train": Dataset(
        "those of the datasets in it",
        {
            "search_r1": _original(
                "PeterJinGo/nq_hotpotqa_train",
                "search_r1",
                "those of the datasets in it",
                {"train": "train", "test": "test"},
                train=169_615,
                test=51_713,
            )
        },
        mixed=True,
    ),
    "any": Dataset("that of the source", {}, mixed=True),
}
"""Name → question set. `any` stands for whatever the rows of a `--source` say."""

SEVEN = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
"""What Search-R1 and those after it evaluate on."""

TRIVIAQA = "triviaqa"
"""Some of its questions are in CSV quoting, which is undone."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A kind of corpus: what its rows are, where it is published, and its licence."""

    about: str
    licence: str
    where: str = ""


CORPORA: Mapping[str, Corpus] = {
    "wiki18": Corpus(
        "id, contents: 100-word passages, the title on line 1; one passage a row, none left out, CSV quoting undone",
        "CC BY-SA 3.0 (Wikipedia's text, December 2018)",
        "hub: PeterJinGo/wiki-18-corpus, file wiki-18.jsonl.gz",
    ),
    "hotpotqa": Corpus(
        "the abstracts of the 2017 dump: a .tar.bz2 of .bz2 files, or the folder it unpacks to; one passage an article",
        "CC BY-SA 4.0 (HotpotQA's processing of Wikipedia)",
        "nlp.stanford.edu/projects/hotpotqa: enwiki-20171001-pages-meta-current-withlinks-abstracts.tar.bz2",
    ),
    "dpr": Corpus("a table with id, text and title", _WIKIPEDIA, "DPR's psgs_w100.tsv.gz"),
    "kilt": Corpus("wikipedia_title and text, a list of paragraphs; cut", _WIKIPEDIA, "kilt_knowledgesource.json"),
    "articles": Corpus("id, title and text of whole articles; cut", _WIKIPEDIA, "hub: wikimedia/wikipedia"),
    "passages": Corpus("id, title, text or id, contents: taken as they are", "that of the source"),
    "mediawiki": Corpus(
        "a MediaWiki XML dump, .xml or .xml.bz2; wiki text made plain, cut",
        _WIKIPEDIA,
        "dumps.wikimedia.org: enwiki-DATE-pages-articles-multistream.xml.bz2",
    ),
}
"""Kind → what it is. "Cut" means into passages of 100 words."""


def find_dataset(name: str) -> Dataset:
    """The question set of that name. Raises ValueError with the names there are."""
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; choose {', '.join(DATASETS)}")
    return DATASETS[name]


def find_release(dataset: str, release: str | None) -> Release:
    """One release of a question set, its first where none is named. Raises ValueError with the names there are."""
    known = find_dataset(dataset).releases
    if not known:
        raise ValueError(f"{dataset} is on no hub; give --source FILE, FOLDER or hf:NAME")
    if release is not None and release not in known:
        raise ValueError(f"{dataset} has no release {release!r}; choose {', '.join(known)}")
    return known[release or next(iter(known))]


def choose_split(wanted: str | None, there: Mapping[str, object], where: str) -> str:
    """The split that is wanted or, where none is named, the first of test, dev and train.

    there: the splits that exist, by our names. Raises ValueError with their names.
    """
    if wanted is not None and wanted not in there:
        raise ValueError(f"{where} has no split {wanted!r}; choose {', '.join(there) or 'another source'}")
    if wanted is not None:
        return wanted
    found = next((name for name in EVALUATION_ORDER if name in there), None)
    if found is None:
        raise ValueError(
            f"{where} has none of the splits {', '.join(EVALUATION_ORDER)}; name one with --split: {there}"
        )
    return found
