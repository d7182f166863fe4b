"""Every combination of presets is read, makes valid settings, and fits 80 GB by the planner."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.main import get_group

from agentgym_ig.commands.main import app
from agentgym_ig.commands.parts import open_recipe, training_config, training_rules
from agentgym_ig.commands.plan import NOT_IN_FILES, planned_job
from agentgym_ig.lm import CACHED_TOKENS
from agentgym_ig.presets import preset_names, read_options
from agentgym_ig.trainers.plan import Job, gpu_of, plan, what_to_lower
from tests.conftest import Command

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-3b": (
        "qwen2",
        {
            "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-7b": (
        "qwen2",
        {
            "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
        },
    ),
    "qwen3-4b": (
        "qwen3",
        {
            "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
SETTINGS = ("igpo", "search-r1")
GPUS = ("1-gpu", "4-gpus", "8-gpus")
# The command as click sees it: its parameters are what a file may say.
OPTIONS = {option.lstrip("-"): own.name for own in get_group(app).commands["train"].params for option in own.opts}


def folder(where: Path, name: str) -> Path:
    """A model folder with a configuration alone, of the published sizes."""
    family, sizes = MODELS[name]
    AutoConfig.for_model(family, max_position_embeddings=32768, **sizes).save_pretrained(where / name)
    return where / name


def job_of(where: Path, *names: str) -> tuple[Job, dict[str, Any]]:
    """What `train --dry-run` plans for those presets."""
    said = read_options(names, [own for own in OPTIONS if own not in NOT_IN_FILES])
    given = {"lora_rank": None, "rollout_batch": 128, "max_cached_tokens": CACHED_TOKENS} | {
        OPTIONS[key]: value for key, value in said.items()
    }
    given["model"] = str(folder(where, names[1]))
    given |= {key: float(given[key]) for key in ("learning_rate",)}
    recipe = open_recipe(given["recipe"], given["suite"], kl=given.get("kl"), entropy=given.get("entropy"))
    rules = {key: given[key] for key in ("prompt", "max_turns", "top_k") if key in given}
    job = planned_job(
        given, recipe, training_config(given["suite"], given, recipe, 0),
        training_rules(given["suite"], rules, recipe), max_new_tokens=given["max_new_tokens"],
    )  # fmt: skip
    return job, given


def test_each_preset_has_its_place() -> None:
    assert set(preset_names()) == {*SETTINGS, *MODELS, *GPUS, "full", "lora"}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_combination_fits(setting: str, model: str, how: str, tmp_path: Path) -> None:
    for gpus in GPUS[how == "full" :]:  # all weights want more than one GPU
        job, given = job_of(tmp_path, setting, model, how, gpus)
        found = plan(job)
        assert found.fits(gpu_of(given["gpu"])), (gpus, found.phases)
        assert job.gpus == int(gpus[0])
        assert job.parts == (job.gpus if how == "full" else 1)
        assert (job.model.lora_rank is None) == (how == "full")
        assert job.reference
        assert job.belief == (setting == "igpo")
        assert job.episodes == (512 if setting == "igpo" else 2560)


@pytest.mark.slow
def test_all_weights_of_7b_on_one_gpu_do_not_fit(tmp_path: Path) -> None:
    job, given = job_of(tmp_path, "search-r1", "qwen2.5-7b", "full", "1-gpu")
    gpu = gpu_of(given["gpu"])
    assert not plan(job).fits(gpu)
    assert what_to_lower(job, gpu)[-1] == "--lora-rank 32"


def test_published_sizes(tmp_path: Path) -> None:
    from agentgym_ig.trainers.footprint import counts, sketch

    found = {name: counts(sketch(str(folder(tmp_path, name)))).parameters for name in MODELS}
    assert found == {"qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512, "qwen3-4b": 4_022_468_096}


def test_later_files_win_and_typed_options_over_all(command: Command, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("micro-batch: 2\nrecipe: grpo\nlearning-rate: 1e-4\nquestions-per-step: 3\n")
    (tmp_path / "two.yaml").write_text("micro-batch: 5\nkl: 0.1\n")
    files = ["--config", tmp_path / "one.yaml", "--config", tmp_path / "two.yaml"]
    code, printed = command("train", "--dry-run", *files, "--group-size", 4)
    assert code == 0, printed
    assert "5 x" in printed
    assert "12 episodes" in printed
    assert "reference copy" in printed
    code, printed = command("train", "--dry-run", *files, "--micro-batch", 7, "--kl", 0)
    assert "7 x" in printed
    assert "reference copy" not in printed


def test_a_file_trains(command: Command, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"out: {tmp_path / 'run'}\nsteps: 1\nquestions-per-step: 2\ngroup-size: 2\nlog-with: [tensorboard]\n"
    )
    code, printed = command("train", "--config", tmp_path / "run.yaml")
    assert code == 0, printed
    assert (tmp_path / "run" / "model").is_dir()
    assert (tmp_path / "run" / "trackers").is_dir()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("micro_batch: 3", "unknown option micro_batch; the options are .*micro-batch"),
        ("config: [igpo]", "unknown option config"),
        ("- a list", "found a list, wanted lines such as"),
        ("a: [", "is no YAML"),
        ("micro-batch: many", "Invalid value for '--micro-batch'"),
    ],
)
def test_errors_of_a_file(command: Command, tmp_path: Path, text: str, wanted: str) -> None:

    (tmp_path / "own.yaml").write_text(text)
    code, printed = command("train", "--dry-run", "--config", tmp_path / "own.yaml")
    assert code in (1, 2)
    assert re.search(wanted, printed), printed


def test_errors_of_a_name(command: Command, tmp_path: Path) -> None:
    for name in ("igpo-9b", tmp_path / "none.yaml"):
        code, printed = command("train", "--config", name)
        assert code == 1
        assert "or one of 1-gpu, 4-gpus, 8-gpus, full, igpo, lora" in printed
