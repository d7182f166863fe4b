"""The run card: all that somebody needs to repeat an evaluation, or to see why two differ."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agentgym_ig.envs.suites import Suite
from agentgym_ig.indexes.base import Index, StoredIndex
from agentgym_ig.indexes.manifest import MANIFEST, read_manifest
from agentgym_ig.provenance import file_sha256, versions
from agentgym_ig.types import Question

PACKAGES = (
    "agentgym_ig",
    "gymnasium",
    "numpy",
    "torch",
    "transformers",
    "tokenizers",
    "bm25s",
    "faiss-cpu",
    "pyserini",
)
"""Packages whose versions can change a figure."""


def run_card(
    suite: Suite,
    policy: Mapping[str, Any],
    *,
    seed: int,
    tries: int = 1,
    index: Sequence[str] = (),
    questions: Mapping[str, Any] | None = None,
    command: Sequence[str] = (),
    judge: str | None = None,
    gain_model: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A suite, a policy and the settings of an evaluation as plain JSON types, without date or time.

    policy: its `name` and whatever else decides what it does. index: the folders or addresses that were opened;
    questions: dataset → the manifest of its file, where it has one.
    """
    made = questions or {}
    return {
        "policy": dict(policy),
        "suite": {
            "name": suite.name,
            "domains": dict(suite.domains),
            "questions": {
                name: {"n": len(own), "sha256": questions_hash(own), **({"made": made[name]} if name in made else {})}
                for name, own in suite.questions.items()
            },
        },
        "index": _index_card(suite.index, index),
        "rules": _rules_card(suite),
        "seed": seed,
        "tries": tries,
        "judge": judge,
        "gain_model": dict(gain_model) if gain_model else None,
        "command": list(command),
        "versions": versions(PACKAGES),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def questions_hash(questions: Sequence[Question]) -> str:
    """SHA-256 over the questions, their answers and supporting passages, in order."""
    lines = (json.dumps([own.id, own.text, own.answers, own.supporting]) + "\n" for own in questions)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _index_card(index: Index, places: Sequence[str]) -> dict[str, Any]:
    card: dict[str, Any] = {"class": type(index).__name__, "places": list(places)}
    if isinstance(index, StoredIndex):
        card |= {"passages": len(index), "corpus_sha256": index.corpus_sha256}
    made = [_manifest(Path(place)) for place in places if (Path(place) / MANIFEST).is_file()]
    return card | ({"made": made} if made else {})


def _manifest(folder: Path) -> dict[str, Any]:
    return {name: value for name, value in read_manifest(folder).items() if name != "files"}


def _rules_card(suite: Suite) -> dict[str, Any]:
    """The rules, a prompt by its name and by the hash of its texts."""
    rules, texts = suite.rules, suite.rules.texts
    card = {name: value for name, value in vars(rules).items() if name not in ("prompt", "weights")}
    named = rules.prompt if isinstance(rules.prompt, str) else "custom"
    written = hashlib.sha256(json.dumps(asdict(texts)).encode()).hexdigest()
    return {
        "prompt": named, "prompt_sha256": written, "grammar": texts.grammar, **card, "weights": dict(rules.weights)
    }  # fmt: skip


def model_revision(name: str, commit: str | None) -> dict[str, str]:
    """What pins a model: the hub's commit, or for a folder the hash of its configuration and weights."""
    if commit:
        return {"commit": commit}
    folder = Path(name)
    files = sorted(path for ending in ("config.json", "*.safetensors") for path in folder.glob(ending))
    if not files:
        return {}
    together = "".join(f"{path.name} {file_sha256(path)}\n" for path in files)
    return {"sha256": hashlib.sha256(together.encode()).hexdigest()}
