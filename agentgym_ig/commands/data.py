"""`agentgym-ig data`: question sets and corpora, from their releases to files that the other commands read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from agentgym_ig.commands.console import bar, console, interruptible

GO_ON = "Run the same command with --resume to go on from here."

Source = Annotated[
    str | None,
    typer.Option(
        help="Rows from here instead of the dataset's release: a .jsonl, .json, .parquet, .csv or .tsv file (or .gz of "
        "one), a folder of them, or hf:NAME."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Commit, branch or tag on the hub; by default the newest commit.")]
Config = Annotated[str | None, typer.Option(help="With hf:NAME: the dataset's configuration.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run has left.")]
Force = Annotated[bool, typer.Option("--force", help="Write over what is there.")]

app = typer.Typer(no_args_is_help=True, help="Prepare question sets and corpora.")


@app.command("list")
def show() -> None:
    """Show the question sets and corpora that are known, where they are published, and their licences."""
    from agentgym_ig.data.releases import CORPORA, DATASETS

    table = Table(title="question sets", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("dataset", "release", "where", "splits and rows, as stated", "licence"):
        table.add_column(heading, overflow="fold")
    for name, dataset in DATASETS.items():
        for number, (own, release) in enumerate(dataset.releases.items()):
            where = ":".join(part for part in (release.repository, release.config) if part)
            splits = ", ".join(_counted(split, release.rows.get(split)) for split in release.splits)
            table.add_row("" if number else name, own, where, splits, dataset.licence)
        if not dataset.releases:
            table.add_row(name, "", "--source", "", dataset.licence)
    console.print(table)
    corpora = Table(title="corpora", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("kind", "rows", "where", "licence"):
        corpora.add_column(heading, overflow="fold")
    for name, corpus in CORPORA.items():
        corpora.add_row(name, corpus.about, corpus.where, corpus.licence)
    console.print(corpora)


def _counted(split: str, rows: int | None) -> str:
    return split if rows is None else f"{split} {rows:,}"


@app.command()
def questions(
    dataset: Annotated[list[str], typer.Argument(help="One or more of `data list`; all: the seven evaluation sets.")],
    out: Annotated[
        Path, typer.Option(help="A folder, for <dataset>.jsonl, or a file that ends in .jsonl or .jsonl.gz.")
    ],
    split: Annotated[
        str | None, typer.Option(help="train, dev or test; by default test, else dev, else train.")
    ] = None,
    source: Source = None,
    release: Annotated[str | None, typer.Option(help="Which of the dataset's releases; by default the first.")] = None,
    config: Config = None,
    revision: Revision = None,
    layout: Annotated[str | None, typer.Option(help="Layout of the rows, where their fields do not tell.")] = None,
    subset: Annotated[int | None, typer.Option(help="Only so many questions (of each part), chosen by hash.")] = None,
    seed: Annotated[int, typer.Option(help="For --subset and --part.")] = 0,
    part: Annotated[str | None, typer.Option(help="Divide by hash, such as train=0.9,dev=0.1.")] = None,
    drop_unreliable: Annotated[
        bool,
        typer.Option("--drop-unreliable", help="Leave out questions whose gold answer cannot be trusted or scored."),
    ] = False,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep a question that stood before with the same answers.")
    ] = False,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Write question sets in our format, with a manifest beside each file."""
    from agentgym_ig.data.prepare import Settings, prepare_questions
    from agentgym_ig.data.releases import SEVEN
    from agentgym_ig.data.sources import Wanted, question_source
    from agentgym_ig.data.work import How

    names = list(SEVEN) if dataset == ["all"] else dataset
    if len(names) > 1 and out.name.endswith((".jsonl", ".gz")):
        raise ValueError(f"--out {out} is one file for {len(names)} datasets; give a folder")
    settings = Settings(
        split=split,
        subset=subset,
        seed=seed,
        parts=_shares(part),
        drop_unreliable=drop_unreliable,
        keep_duplicates=keep_duplicates,
    )
    wanted = Wanted(source=source, release=release, config=config, split=split, revision=revision, layout=layout)
    for name in names:
        found = question_source(name, wanted)
        with interruptible(GO_ON), bar(f"{name} {found.split or ''}".strip(), found.count) as advance:
            how = How(resume, force, lambda read, kept: advance(read, f"{kept:,} kept"))
            made = prepare_questions(name, found, out, settings, how)
        for path, manifest in made.items():
            _say(path, manifest, "questions")


def _shares(given: str | None) -> Mapping[str, float]:
    """The shares of `train=0.9,dev=0.1`."""
    shares: dict[str, float] = {}
    for piece in given.split(",") if given else ():
        name, _, share = (text.strip() for text in piece.partition("="))
        try:
            shares[name] = float(share)
        except ValueError as error:
            raise ValueError(f"--part {given!r}: give names and shares, such as train=0.9,dev=0.1") from error
        if not name.isidentifier():
            raise ValueError(f"--part {given!r}: {name!r} is no name for a folder; give train, dev or the like")
    return shares


def _say(path: Path, manifest: dict[str, Any], what: str) -> None:
    rows = manifest["rows"]
    dropped = ", ".join(f"{number:,} {name}" for name, number in rows["dropped"].items())
    console.print(
        f"{rows['written']:,} {what} of {rows['read']:,} rows: {escape(str(path))}"
        + (f" (left out: {dropped})" if dropped else ""),
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def corpus(
    kind: Annotated[str, typer.Argument(help="One of the kinds of `data list`.")],
    source: Annotated[str, typer.Option(help="A file, a folder of files, or hf:NAME.")],
    out: Annotated[Path, typer.Option(help="A file that ends in .jsonl or .jsonl.gz.")],
    words: Annotated[int, typer.Option(help="Words of a passage cut from an article.")] = 100,
    drop_duplicates: Annotated[
        bool,
        typer.Option(
            "--drop-duplicates", help="Leave out passages that stood before; up to 50 bytes of memory for each."
        ),
    ] = False,
    workers: Annotated[int, typer.Option(help="mediawiki: processes that make wiki text plain.")] = 1,
    config: Config = None,
    split: Annotated[str, typer.Option(help="With hf:NAME: the split.")] = "train",
    revision: Revision = None,
    resume: Resume = False,
    force: Force = False,
) -> None:
    """Write a corpus that `agentgym-ig index build` reads, with a manifest beside it."""
    from agentgym_ig.data.corpora import CorpusSettings, prepare_corpus
    from agentgym_ig.data.work import How

    settings = CorpusSettings(
        words=words, drop_duplicates=drop_duplicates, workers=workers, config=config, split=split, revision=revision
    )
    with interruptible(GO_ON), bar(f"{kind}: rows", None) as advance:
        how = How(resume, force, lambda read, kept: advance(read, f"{kept:,} passages"))
        made = prepare_corpus(kind, source, out, settings, how)
    _say(out, made, "passages")


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Files that `data questions` or `data corpus` wrote.")],
) -> None:
    """Read prepared files and compare their rows with the hash in their manifests."""
    from agentgym_ig.data.manifest import is_unchanged

    changed = [path for path in files if not is_unchanged(path)]
    for path in files:
        console.print(f"{escape(str(path))}: {'[red]changed[/]' if path in changed else 'as it was prepared'}")
    if changed:
        raise typer.Exit(1)
