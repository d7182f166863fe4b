"""Rows of datasets on the Hugging Face hub, streamed, and errors that say what to do without the hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentgym_ig.errors import CorpusError, HubUnreachable


def is_local(repository: str) -> bool:
    """Whether the name is that of a folder here, which `datasets` loads in the same way."""
    return Path(repository).is_dir()


@contextmanager
def _reached(repository: str) -> Iterator[None]:
    """What goes wrong on the way to the hub, in words that help."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except (DatasetNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CorpusError(
            f"the hub has no dataset {repository!r} in that revision, or it wants a login: {error}"
        ) from error
    except Exception as error:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if not isinstance(error, HfHubHTTPError) and not kinds & {"ConnectionError", "TransportError"}:
            raise
        raise HubUnreachable(
            f"cannot reach {repository!r} on the hub ({type(error).__name__}: {error}). Without a connection use "
            f"files: where there is one, run `hf download {repository} --repo-type dataset --local-dir FOLDER`, copy "
            "FOLDER here, and give --source FOLDER, or one file of it"
        ) from error


@contextmanager
def _without_torch() -> Iterator[None]:
    """A streamed dataset imports torch, 150 MB, to be one of torch's too; these rows are only read."""
    from datasets import config

    available = config.TORCH_AVAILABLE
    config.TORCH_AVAILABLE = available and "torch" in sys.modules
    try:
        yield
    finally:
        config.TORCH_AVAILABLE = available


def resolve_revision(repository: str, revision: str | None) -> str | None:
    """The commit that a branch or tag names now (None: the main branch); None for a folder on this machine.

    Raises HubUnreachable and CorpusError.
    """
    if is_local(repository):
        return None
    from huggingface_hub import HfApi

    with _reached(repository):
        return HfApi().dataset_info(repository, revision=revision).sha


def hub_splits(repository: str, config: str | None, revision: str | None = None) -> list[str]:
    """The splits that a dataset of the hub has. Raises HubUnreachable and CorpusError."""
    from datasets import get_dataset_split_names

    with _reached(repository):
        try:
            return sorted(map(str, get_dataset_split_names(repository, config, revision=revision)))
        except ValueError as error:
            raise CorpusError(f"{repository}: {error}") from error


def hub_count(repository: str, split: str) -> int:
    """How many rows a split has; 0 where the hub does not say. Raises HubUnreachable and CorpusError."""
    from datasets import load_dataset_builder

    with _reached(repository):
        splits = load_dataset_builder(repository).info.splits or {}
    return int(splits[split].num_examples or 0) if split in splits else 0


def hub_rows(
    repository: str, config: str | None, split: str, revision: str | None = None, skip: int = 0
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of one split, streamed: nothing is stored on disk. `skip` of them are passed over.

    Raises HubUnreachable, and CorpusError for a dataset, configuration or split that does not exist.
    """
    from datasets import load_dataset

    name = ":".join(part for part in (repository, config, split) if part)
    with _reached(repository):
        try:
            with _without_torch():
                rows = load_dataset(repository, config, split=split, revision=revision, streaming=True).skip(skip)
        except ValueError as error:
            raise CorpusError(f"{repository}: {error}") from error
        for number, row in enumerate(rows, skip + 1):
            yield f"{name}:{number}", row
