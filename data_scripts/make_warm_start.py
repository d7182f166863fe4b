"""Make the TinyWiki warm start that the package ships, or check that it comes out the same bit for bit.

    python data_scripts/make_warm_start.py --out agentgym_ig/tinywiki/warm-start
    python data_scripts/make_warm_start.py --check agentgym_ig/tinywiki/warm-start

Takes about four minutes on one core. The weights are equal bit for bit on one kind of processor with one torch
version and one thread, as long as the code adds in the same order; the shipped ones are of commit 3c8ce51.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from agentgym_ig.commands.console import bar, console
from agentgym_ig.provenance import file_sha256
from agentgym_ig.trainers.checkpoint import save_model
from agentgym_ig.trainers.warm_start import WarmStartConfig, warm_start

WEIGHTS = "model.safetensors"


def main(
    out: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    check: Annotated[Path | None, typer.Option(help="Folder to compare with.")] = None,
) -> None:
    """Train the warm start from its seed."""
    if (out is None) == (check is None):
        raise typer.BadParameter("give one of --out and --check")
    torch.set_num_threads(1)
    config = WarmStartConfig()
    with bar("warm start", config.steps) as advance:
        model, tokenizer = warm_start(config, progress=lambda step, loss: advance(step + 1, f"loss {loss:.3f}"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch) / "warm_start"
        save_model(folder, model, tokenizer)
        made = file_sha256(folder / WEIGHTS)
    console.print(f"sha256 of {WEIGHTS}: {made}")
    if check is not None:
        same = made == file_sha256(check / WEIGHTS)
        console.print("equal bit for bit" if same else f"not equal to {check}")
        raise typer.Exit(0 if same else 1)


if __name__ == "__main__":
    typer.run(main)
