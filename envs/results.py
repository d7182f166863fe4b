"""An evaluation as a folder: its run card, its episodes, its figures, and the table as people paste it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agentgym_ig.envs.evaluate import Evaluation
from agentgym_ig.errors import CorpusError
from agentgym_ig.headings import HEADINGS, PLAIN
from agentgym_ig.records import EPISODES_FILE, EVALUATION_FILE, read_episodes, write_json, write_whole
from agentgym_ig.types import Trajectory

FORMAT = 1
CARD, VERDICTS, MARKDOWN, CSV = "card.json", "verdicts.json", "table.md", "table.csv"
TIMES = "times.jsonl"

COMPARED = ("policy", "suite", "index", "rules", "seed", "tries", "judge", "gain_model")
"""What of a card must be the same for an evaluation to go on; a judge and a gain model may come later."""
LATER = ("judge", "gain_model")


def claim(folder: Path, card: Mapping[str, Any], *, resume: bool = False, force: bool = False) -> None:
    """Note the run card in the folder of an evaluation that begins or goes on.

    Raises FileExistsError for a folder that is in use, unless it is to be gone on with or written over, and ValueError
    where what it was begun with differs from what is asked for now.
    """
    path = folder / CARD
    if resume and force:
        raise ValueError("--resume goes on with what is there and --force begins anew; give one of them")
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file, wanted a folder; give another --out")
    if force:
        for name in (CARD, EPISODES_FILE, VERDICTS, TIMES, EVALUATION_FILE, MARKDOWN, CSV):
            (folder / name).unlink(missing_ok=True)
    elif path.is_file() and resume:
        begun, now = _compared(_read(path)), _compared(json.loads(json.dumps(card)))
        later = [name for name in LATER if begun[name] is None]
        if differ := [name for name in COMPARED if begun[name] != now[name] and name not in later]:
            raise ValueError(
                f"{folder} was begun with another {' and '.join(differ)} (see its {CARD}); give another --out, or"
                " --force to begin anew"
            )
    elif folder.exists() and any(folder.iterdir()):
        advice = "go on with --resume, begin anew with --force" if path.is_file() else "it holds no evaluation"
        raise FileExistsError(f"{folder} is there already and not empty; {advice}, or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, card)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CorpusError(f"{path} cannot be read: {error}; begin anew with --force") from error


def _compared(card: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal; an index that is known by its content may lie elsewhere now."""
    own = {name: card.get(name) for name in COMPARED}
    index = own["index"] or {}
    if index.get("made") or index.get("corpus_sha256"):
        own["index"] = {name: value for name, value in index.items() if name != "places"}
    return own


def note_time(folder: Path, seconds: float) -> None:
    """Add a line of when and how long episodes were played; apart from the figures, which know no time."""
    line = json.dumps({"ended": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": seconds})
    with (folder / TIMES).open("a") as out:
        out.write(line + "\n")


def save(folder: Path, result: Evaluation, card: Mapping[str, Any]) -> dict[str, Any]:
    """Write the figures as JSON, Markdown and CSV; equal episodes give equal bytes. Returns what the JSON holds."""
    figures = {"format": FORMAT, "card": dict(card), **result.as_dict()}
    write_whole(folder / MARKDOWN, markdown(figures).encode(errors="replace"))
    write_whole(folder / CSV, as_csv(figures).encode(errors="replace"))
    write_json(folder / EVALUATION_FILE, figures)
    return figures


def load(folder: Path) -> Evaluation:
    """The evaluation that `save` wrote.

    Raises FileNotFoundError, and CorpusError for figures that cannot be read or of another format.
    """
    path = folder / EVALUATION_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {EVALUATION_FILE} in {folder}; make one: agentgym-ig eval --out {folder} ...")
    try:
        figures = json.loads(path.read_text())
        if figures["format"] != FORMAT:
            raise ValueError(f"it is of format {figures['format']}, wanted {FORMAT}")
        suite, domains = figures["suite"], figures["card"]["suite"]["domains"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path} cannot be read: {error!r}") from error
    # A log has them in the order of their ends.
    episodes = sorted(read_episodes(folder / EPISODES_FILE), key=lambda own: (own.group, own.seed))
    judged = (folder / VERDICTS).is_file()
    return Evaluation(suite, domains, episodes, read_verdicts(folder, episodes) if judged else None)


def _judged_answer(episode: Trajectory) -> str:
    """What a verdict is on, as the key of a JSON object: the question, the try, and the answer that it gave."""
    return json.dumps([episode.group, episode.seed, episode.answer])


def write_verdicts(folder: Path, episodes: Sequence[Trajectory], verdicts: Sequence[float | None]) -> None:
    """Keep a judge's verdicts, one for each episode."""
    pairs = zip(map(_judged_answer, episodes), verdicts, strict=True)
    write_json(folder / VERDICTS, {key: verdict for key, verdict in pairs if verdict is not None})


def read_verdicts(folder: Path, episodes: Sequence[Trajectory]) -> list[float | None]:
    """The verdicts on the episodes' answers that are kept; None for answers without one."""
    path = folder / VERDICTS
    kept = _read(path) if path.is_file() else {}
    return [kept.get(_judged_answer(episode)) for episode in episodes]


def rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table's lines: the datasets, then the means over a domain's and over all datasets."""
    lines = [{"dataset": name, **own} for name, own in figures["datasets"].items()]
    means = [name for name in ("in_domain", "out_of_domain", "all") if name in figures]
    return lines + [{"dataset": "mean", "domain": name, **figures[name]} for name in means]


def columns(lines: list[dict[str, Any]]) -> list[str]:
    """The figures of `HEADINGS` that any line has."""
    return [name for name in HEADINGS if any(name in line for line in lines)]


def cell(line: Mapping[str, Any], name: str) -> str:
    """A figure as it is shown, with its interval if it has one."""
    value = line.get(name)
    if value is None:
        return ""
    if name in PLAIN:
        return f"{value:.2f}" if value < 100 else f"{value:,.0f}"
    interval = line.get("intervals", {}).get(name)
    shown = f"{100 * value:.1f}"
    return shown if interval is None else f"{shown} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def markdown(figures: Mapping[str, Any]) -> str:
    """The table, and the run card under it."""
    lines = rows(figures)
    shown = columns(lines)
    table = [["dataset", "domain", "n", *(HEADINGS[name] for name in shown)]]
    table.append(["---"] * len(table[0]))
    for line in lines:
        domain = line["domain"].replace("_", "-")
        table.append([line["dataset"], domain, str(line.get("n", "")), *(cell(line, name) for name in shown)])
    head = f"# {figures['card']['policy']['name']} on {figures['suite']}\n\n"
    explained = (
        "EM and F1 as SQuAD's scorer has them; cover: the answer stands in the prediction (cover-EM); recall: share of"
        " the supporting passages that were retrieved. Shares in percent, with 95 % bootstrap intervals over"
        " questions.\n"
    )
    card = json.dumps(figures["card"], indent=1, ensure_ascii=False)
    body = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in table)
    return f"{head}{body}\n\n{explained}\n## Run card\n\n```json\n{card}\n```\n"


def as_csv(figures: Mapping[str, Any]) -> str:
    """The table with full precision; an interval's ends are columns of their own."""
    lines = rows(figures)
    shown = columns(lines)
    ends = [name for name in shown if any(name in line.get("intervals", {}) for line in lines)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    bounds = [f"{name}_{end}" for name in ends for end in ("low", "high")]
    writer.writerow(["dataset", "domain", "n", *shown, *bounds])
    for line in lines:
        intervals = [end for name in ends for end in line.get("intervals", {}).get(name, ("", ""))]
        writer.writerow(
            [line["dataset"], line["domain"], line.get("n", ""), *(line.get(name, "") for name in shown), *intervals]
        )
    return out.getvalue()
