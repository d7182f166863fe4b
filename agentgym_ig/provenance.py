"""What a record says of how something was made: the hash of a file, and the versions of the libraries."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from hashlib import file_digest
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def file_sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with path.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
