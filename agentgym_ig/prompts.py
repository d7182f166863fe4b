"""All that an environment writes, as data: `PROMPTS` by name, or a `Prompt` of your own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agentgym_ig.grammar import GRAMMARS
from agentgym_ig.text import neutralise
from agentgym_ig.types import Message, Passage


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """How an episode reads.

    grammar: name of the action grammar, in `agentgym_ig.grammar.GRAMMARS`.
    system: the system message; none if empty.
    question: the first message; `{question}` and `{max_turns}` are filled in.
    passage: one passage of a reply; `{rank}`, `{title}` and `{text}` are filled in.
    reply: what surrounds the passages, `{passages}`; nothing_found and malformed stand in their place.
    answer_prefix, answer_suffix: what is put around the gold answer when its likelihood is read
    (IGPO, arXiv 2510.14967, §3); only the answer between them is scored.

    Braces that are meant as such are doubled. Raises ValueError for a grammar that does not exist and for a text
    without its place to fill in, or with others.
    """

    grammar: str = "tags"
    system: str = ""
    question: str
    passage: str
    reply: str
    nothing_found: str
    malformed: str
    answer_prefix: str
    answer_suffix: str

    def __post_init__(self) -> None:
        if self.grammar not in GRAMMARS:
            raise ValueError(f"unknown grammar {self.grammar!r}; choose one of {', '.join(sorted(GRAMMARS))}")
        for name, field in (("question", "{question}"), ("passage", "{text}"), ("reply", "{passages}")):
            if field not in getattr(self, name):
                raise ValueError(f"the prompt's {name} has no {field} to fill in")
        try:
            self.opening("?", 1)
            self.render_shown(self.shown([Passage("1", "title", "text")]))
            self.render_malformed("fault")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"a text of the prompt cannot be filled in ({error!r}); write {{{{ and }}}} for braces"
            ) from error

    def opening(self, question: str, max_turns: int) -> tuple[Message, ...]:
        """The messages that an episode begins with."""
        asked = Message("user", self.question.format(question=neutralise(question), max_turns=max_turns))
        return (Message("system", self.system), asked) if self.system else (asked,)

    def shown(self, passages: Sequence[Passage]) -> list[str]:
        """Each passage as a reply shows it."""
        return [
            self.passage.format(rank=rank, title=neutralise(passage.title), text=neutralise(passage.text))
            for rank, passage in enumerate(passages, 1)
        ]

    def render_shown(self, shown: Sequence[str]) -> str:
        """The reply to a search, from passages as `shown` gives them."""
        return self.reply.format(passages="\n".join(shown) if shown else self.nothing_found)

    def render_malformed(self, fault: str) -> str:
        """The reply to an action that follows no rule."""
        return self.reply.format(passages=self.malformed.format(fault=neutralise(fault)))


def with_guide(prompt: Prompt) -> Prompt:
    """The prompt with Self-Guide's request (arXiv 2604.03098): every action opens with a short self-assessment."""
    request = (
        "Begin every turn with <guide> and </guide>: between them, say in one sentence how well the search is going"
        " and what it still lacks, and end with one word as your verdict: positive, neutral or negative. Then let"
        " that guide what you do in this turn.\n"
    )
    return replace(prompt, question=prompt.question.rstrip("\n") + "\n" + request)


PROMPTS = {
    "search-r1": Prompt(
        question=(
            "Answer the question below. You can look things up in an encyclopedia as often as you need, in at most"
            " {max_turns} turns. In every turn, first reason inside <think> and </think>. Then do one of two things:"
            " write a search query inside <search> and </search>, and the best passages come back between"
            " <information> and </information>; or, once you know enough, write the answer, as short as possible and"
            " without explanation, inside <answer> and </answer>. For example: <answer>Marie Curie</answer>.\n"
            "Question: {question}\n"
        ),
        passage="[{rank}] {title}: {text}",
        reply="\n\n<information>\n{passages}\n</information>\n\n",
        nothing_found="No passage matches this query.",
        malformed="This turn could not be read: {fault}.",
        answer_prefix="<think>I have found what I need.</think>\n<answer>",
        answer_suffix="</answer>",
    ),
    "closed-book": Prompt(
        question=(
            "Answer the question below from what you know. Reason inside <think> and </think>, and then write the"
            " answer, as short as possible and without explanation, inside <answer> and </answer>. For example:"
            " <answer>Marie Curie</answer>.\nQuestion: {question}\n"
        ),
        passage="[{rank}] {title}: {text}",
        reply="\n\n<information>\n{passages}\n</information>\n\n",
        nothing_found="No passage matches this query.",
        malformed="This turn could not be read: {fault}.",
        answer_prefix="<think>I know this.</think>\n<answer>",
        answer_suffix="</answer>",
    ),
    "igpo": Prompt(
        grammar="tools",
        system=(
            "You research questions step by step with the help of a tool, and then answer them.\n\n"
            "The tool is described between <tools> and </tools> by its JSON signature:\n<tools>\n"
            '{"name": "search", "description": "Searches an encyclopedia and returns the best passages.",'
            ' "parameters": {"type": "object", "properties": {"query": {"type": "array", "items": {"type":'
            ' "string"}, "minItems": 1, "maxItems": 3, "description": "One to three queries"}}, "required":'
            ' ["query"]}}\n</tools>\n\n'
            "Every turn has one of two forms and no other:\n"
            "1. <think> your reasoning </think> and then <tool_call>"
            '{"name": "search", "arguments": {"query": ["first query", "second query"]}}</tool_call>\n'
            "2. <think> your reasoning </think> and then <answer> the answer </answer>\n\n"
            "The answer is the shortest phrase that is right, without explanation; a question that asks whether"
            " something is so is answered with yes or no."
        ),
        question="You have at most {max_turns} turns.\nQuestion: {question}",
        passage="[{rank}] {title}: {text}",
        reply="{passages}",
        nothing_found="No passage matches these queries.",
        malformed="The turn could not be read: {fault}.",
        answer_prefix="<think>\nNow I know enough to answer.\n</think>\n<answer>\n",
        answer_suffix="\n</answer>",
    ),
    "tinywiki": Prompt(
        question="{question}",
        passage="{text}",
        reply="<information>{passages}</information>",
        nothing_found="nothing",
        malformed="nothing",
        answer_prefix="<answer>",
        answer_suffix="</answer>",
    ),
}
"""Prompts by name."""
