"""The gold passages of questions, looked up in an index. Nothing here reaches a policy."""

from __future__ import annotations

from collections.abc import Iterable

from agentgym_ig.indexes.base import StoredIndex
from agentgym_ig.types import Passage, Question


def gold_passages(index: StoredIndex, questions: Iterable[Question]) -> dict[str, Passage]:
    """Id → passage of all supporting passages. Reads the corpus once, until all are found.

    Raises ValueError, with some of the ids, where the corpus lacks any.
    """
    wanted = {passage for question in questions for passage in question.supporting}
    found: dict[str, Passage] = {}
    for passage in index.passages() if wanted else ():
        if passage.id in wanted:
            found[passage.id] = passage
            if len(found) == len(wanted):
                break
    if lacking := wanted - set(found):
        some = ", ".join(sorted(lacking)[:3])
        raise ValueError(
            f"the index lacks {len(lacking)} of {len(wanted)} supporting passages, such as {some}; build it from the"
            " corpus that the questions were made for, or leave out what needs gold passages"
        )
    return found
