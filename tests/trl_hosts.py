"""TRL as a host in small: the shipped policy in the small world. Run as a script, it trains under a launcher:
`python -m torch.distributed.run --nproc-per-node 2 -m tests.trl_hosts FOLDER 2` writes FOLDER/weights.safetensors.
"""

from __future__ import annotations

import atexit
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from trl import GRPOConfig

from agentgym_ig.envs.rollout import VectorSearch
from agentgym_ig.trainers import Recipe, ranks, recipe
from agentgym_ig.trainers.tinywiki import WARM_START, load_policy_model, tiny_recipe
from agentgym_ig.trainers.trl_host import SearchGRPOTrainer, trl_settings
from tests.rank_runs import print_threads_left
from tests.runs import paid_env

EACH, ROWS = 4, 12
PLAIN: dict[str, Any] = {
    "num_generations": EACH,
    "per_device_train_batch_size": ROWS,
    "max_completion_length": 16,
    "max_steps": 1,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}
OWN = ("model", "processing_class", "train_dataset", "eval_dataset", "peft_config", "aliases")


def config(out: Path, chosen: Recipe, **settings: Any) -> GRPOConfig:
    return GRPOConfig(str(out), **(trl_settings(chosen) | {"learning_rate": 5e-4} | PLAIN | settings))


def host(
    out: Path, chosen: str | Recipe = "igpo", *, env: VectorSearch | None = None, rate: float | None = None, **own: Any
) -> SearchGRPOTrainer:
    """A trainer of the shipped policy. rate: of plain gradient descent, so that a step shows its gradient; None for
    TRL's optimiser. own: what the trainer takes itself; all else are settings.
    """
    named = tiny_recipe(chosen) if isinstance(chosen, str) else chosen
    model, tokenizer = load_policy_model(WARM_START)
    taken: dict[str, Any] = {"model": model, "processing_class": tokenizer}
    taken |= {name: own.pop(name) for name in OWN if name in own}
    if rate is not None:
        taken["optimizers"] = (torch.optim.SGD(model.parameters(), lr=rate), None)
    return SearchGRPOTrainer(env=env or paid_env(ROWS), recipe=named, args=config(out, named, **own), **taken)


def batch(trainer: SearchGRPOTrainer, questions: int = ROWS // EACH) -> dict[str, Any]:
    """What the trainer makes of its first rows, before it cuts and shuffles them."""
    trainer.model.train()  # as in a step; else TRL takes it for an evaluation
    rows = [trainer.train_dataset[row // EACH] for row in range(questions * EACH)]
    made: dict[str, Any] = trainer._generate_and_score_completions(rows)
    return made


def everything() -> Recipe:
    """IGPO with the KL and entropy terms that it has outside of TinyWiki, heavy enough to be seen."""
    return replace(recipe("igpo"), kl=0.05, entropy=0.01)


def shared(folder: Path, processes: int) -> SearchGRPOTrainer:
    """Two steps of two parts each, their rows shared among so many processes."""
    parts: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 2, "num_generations": 3}
    if processes > 1:
        parts["ddp_backend"] = "gloo"
    return host(folder, everything(), rate=0.05, per_device_train_batch_size=ROWS // 2 // processes, **parts)


def train_shared(folder: Path, processes: int) -> None:
    """As one of so many processes; the first writes the weights and the log."""
    trainer = shared(folder, processes)
    assert trainer.accelerator.num_processes == processes
    trainer.train()
    if trainer.accelerator.is_main_process:
        save_model(trainer.model, str(folder / "weights.safetensors"))
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    atexit.register(print_threads_left)
    torch.set_num_threads(1)
    train_shared(Path(sys.argv[1]), int(sys.argv[2]))
    ranks.leave()
