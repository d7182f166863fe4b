"""Ready options of `agentgym-ig train`, as YAML files: `--config igpo --config qwen2.5-7b --config 8-gpus`.

A file's keys are the command's options. There is one for each setting, model, number of GPUs and way of training, and
they are put together on the command line: of several that say the same the later wins, and an option that is typed wins
over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any


def preset_names() -> list[str]:
    """The presets that the package brings."""
    return sorted(own.name.removesuffix(".yaml") for own in files(__name__).iterdir() if own.name.endswith(".yaml"))


def read_options(names: Sequence[str], allowed: Sequence[str]) -> dict[str, Any]:
    """The options that presets, by name, and YAML files, by path, say together; the later win.

    allowed: the options that there are. Raises FileNotFoundError for a name that is neither, and ValueError, naming
    the file, for what is no mapping, and for an option that there is not.
    """
    import yaml

    options: dict[str, Any] = {}
    for name in names:
        try:
            said = yaml.safe_load(_text(name)) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"--config {name} is no YAML: {error}") from error
        if not isinstance(said, dict):
            raise ValueError(f"--config {name}: found a {type(said).__name__}, wanted lines such as 'group-size: 16'")
        if unknown := [str(key) for key in said if key not in allowed]:
            wanted = ", ".join(sorted(allowed))
            raise ValueError(f"--config {name}: unknown option {', '.join(unknown)}; the options are {wanted}")
        options |= said
    return options


def _text(name: str) -> str:
    path = Path(name)
    if name.endswith((".yaml", ".yml")):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    elif name in preset_names():
        return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")
    raise FileNotFoundError(
        f"no --config {name}: give a .yaml file that is there, or one of {', '.join(preset_names())}"
    )
