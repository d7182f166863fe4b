"""The `agentgym-ig` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer
from rich.markup import escape

from agentgym_ig.commands import data, index
from agentgym_ig.commands.console import console
from agentgym_ig.commands.evaluate import compare, evaluate
from agentgym_ig.commands.quickstart import quickstart
from agentgym_ig.commands.report import report, show
from agentgym_ig.commands.sft import sft
from agentgym_ig.commands.train import train
from agentgym_ig.errors import AgentGymError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Environments, dense reward channels and trainers for LLM search agents.",
)
app.add_typer(data.app, name="data")
app.add_typer(index.app, name="index")
app.command("eval")(evaluate)
app.command()(compare)
app.command()(train)
app.command()(sft)
app.command()(report)
app.command()(show)
app.command()(quickstart)


def main() -> None:
    """The whole command line."""
    _run(app)


def run(command: Callable[..., None]) -> None:
    """A single command as a program of its own."""
    _run(lambda: typer.run(command))


def _run(program: Callable[[], object]) -> None:
    """A mistake of the user's ends in one clear line, not in a traceback.

    Set AGENTGYM_IG_TRACEBACK=1 to see where an error came from.
    """
    try:
        program()
    except (AgentGymError, ImportError, ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
        if os.environ.get("AGENTGYM_IG_TRACEBACK"):
            raise
        console.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
