"""Suites: named sets of datasets, each in-domain or out-of-domain, with what is searched and by which rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from agentgym_ig.envs.episode import Rules
from agentgym_ig.envs.search import SearchVectorEnv
from agentgym_ig.errors import CorpusError
from agentgym_ig.indexes.base import Index
from agentgym_ig.types import Question

Domain = Literal["in_domain", "out_of_domain"]
DOMAINS: tuple[Domain, ...] = ("in_domain", "out_of_domain")
Domains = Mapping[str, Domain]


def _domains(in_domain: str, out_of_domain: str) -> Domains:
    first: dict[str, Domain] = dict.fromkeys(in_domain.split(), "in_domain")
    return MappingProxyType({**first, **dict.fromkeys(out_of_domain.split(), "out_of_domain")})


SUITES: Mapping[str, Domains] = MappingProxyType(
    {
        "tinywiki": _domains("hop2 hop3", "compose2 compose3"),
        "miniwiki": _domains("science history places", "arts"),
        "igpo": _domains("nq triviaqa hotpotqa 2wikimultihopqa", "musique bamboogle popqa"),
        "search-r1": _domains("nq hotpotqa", "triviaqa popqa 2wikimultihopqa musique bamboogle"),
    }
)
"""Suite → dataset → domain. `igpo` and `search-r1` are grouped as in those papers."""


def suite_datasets(name: str) -> Domains:
    """The datasets of a suite. Raises ValueError, listing all names, where there is no such suite."""
    if name not in SUITES:
        raise ValueError(
            f"unknown suite {name!r}; choose one of {', '.join(sorted(SUITES))}, or give a YAML file of your own"
        )
    return SUITES[name]


@dataclass(frozen=True)
class Suite:
    """A named set of datasets, ready to be asked: the questions of each, what is searched, and by which rules.

    `domains` says for every dataset whether it is in-domain; a suite of `SUITES` has its own.
    """

    name: str
    questions: Mapping[str, Sequence[Question]]
    index: Index
    rules: Rules
    domains: Domains = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.domains:
            object.__setattr__(self, "domains", suite_datasets(self.name))
        strange = sorted(set(self.questions) - set(self.domains))
        if strange or not self.questions:
            wanted = ", ".join(self.domains)
            raise ValueError(f"suite {self.name!r} is made of {wanted}; found {', '.join(strange) or 'no questions'}")
        for dataset, own in self.questions.items():
            if other := next((question for question in own if question.dataset != dataset), None):
                raise ValueError(
                    f"question {other.id!r} stands under {dataset!r} and says that it is of {other.dataset!r};"
                    " make them agree"
                )

    def env(self, num_envs: int) -> SearchVectorEnv:
        """A vector environment over all of the suite's questions."""
        everything = [question for own in self.questions.values() for question in own]
        return SearchVectorEnv(self.index, everything, num_envs, self.rules)


@dataclass(frozen=True, kw_only=True)
class SuiteFile:
    """A suite of the user's own, as a YAML file says it.

    Paths in it are relative to the file.
    """

    name: str
    in_domain: tuple[str, ...] = ()
    out_of_domain: tuple[str, ...] = ()
    questions: Path | None = None
    """Folder with `<dataset>.jsonl` or `<dataset>.jsonl.gz` files."""
    index: tuple[str, ...] = ()
    """Folders or addresses of indexes; several are fused by their ranks."""
    rules: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Rules`."""

    @property
    def domains(self) -> Domains:
        """Dataset → domain."""
        return _domains(" ".join(self.in_domain), " ".join(self.out_of_domain))


def read_suite(path: Path) -> SuiteFile:
    """The suite that a YAML file describes.

    Raises FileNotFoundError, and CorpusError, naming the file, for one that says something else than a suite.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a YAML file, or one of {', '.join(sorted(SUITES))}")
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"found a {type(said).__name__}, wanted the fields of a suite")
        return _suite_file(path, said)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        names = ", ".join(own.name for own in fields(SuiteFile))
        raise CorpusError(f"{path} is no suite: {error}; its fields are {names}") from error


def _suite_file(path: Path, said: dict[str, Any]) -> SuiteFile:
    own = {"name": path.stem, **said}
    if unknown := sorted(set(own) - {each.name for each in fields(SuiteFile)}):
        raise ValueError(f"unknown field {', '.join(map(str, unknown))}")
    for name, kind in {"name": str, "questions": str, "rules": dict}.items():
        if own.get(name) is not None and not isinstance(own[name], kind):
            wanted = "a mapping of rules to values" if kind is dict else "a text"
            raise ValueError(f"{name} is {own[name]!r}, wanted {wanted}")
    own |= {name: _names(name, own[name]) for name in ("in_domain", "out_of_domain", "index") if name in own}
    if not (own.get("in_domain") or own.get("out_of_domain")):
        raise ValueError("it names no dataset under in_domain or out_of_domain")
    if both := set(own.get("in_domain", ())) & set(own.get("out_of_domain", ())):
        raise ValueError(f"{', '.join(sorted(both))} cannot be in-domain and out-of-domain")
    own["index"] = tuple(
        place if place.startswith(("http://", "https://")) else str(path.parent / place)
        for place in own.get("index", ())
    )
    if own.get("questions") is not None:
        own["questions"] = path.parent / own["questions"]
    own["rules"] = own.get("rules") or {}
    Rules(**own["rules"])
    return SuiteFile(**own)


def _names(field_name: str, value: object) -> tuple[str, ...]:
    """One name or a list of them."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise ValueError(f"{field_name} is {value!r}, wanted a list of names")
    if strange := [name for name in listed if not name.strip() or " " in name]:
        raise ValueError(f"{field_name} has {strange[0]!r}; a name is one word")
    return tuple(listed)
