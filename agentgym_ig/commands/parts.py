"""The parts that commands are put together from, made from what the user typed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentgym_ig.baselines import closed_book, multi_hop, retrieve_once
from agentgym_ig.data.manifest import manifest_path, read_manifest
from agentgym_ig.data.questions import read_questions
from agentgym_ig.envs.channels import SelfGuide
from agentgym_ig.envs.datasets import question_file
from agentgym_ig.envs.episode import Rules
from agentgym_ig.envs.gold import gold_passages
from agentgym_ig.envs.miniwiki import miniwiki_suite
from agentgym_ig.envs.rollout import VectorSearch, prompts_of
from agentgym_ig.envs.search import SearchVectorEnv
from agentgym_ig.envs.suites import Domains, Suite, read_suite, suite_datasets
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES
from agentgym_ig.envs.wrappers import add_channel
from agentgym_ig.errors import CorpusError
from agentgym_ig.indexes.base import StoredIndex
from agentgym_ig.indexes.opening import open_indexes
from agentgym_ig.policies import Policy, RandomPolicy, oracle
from agentgym_ig.prompts import with_guide
from agentgym_ig.types import Question

Indexes = Annotated[
    list[str],
    typer.Option("--index", help="Folder of an index, or a server's address; several are fused by their ranks."),
]
Rerank = Annotated[str | None, typer.Option(help="Sort what was found by this cross-encoder (sentence-transformers).")]
Moved = Annotated[str | None, typer.Option("--encoder", help="The dense index's encoder, if it lies elsewhere now.")]
Device = Annotated[str | None, typer.Option(help="Where a dense index computes; by default a GPU if there is one.")]
Cache = Annotated[Path | None, typer.Option(help="Keep results in this file, for later runs too.")]

if TYPE_CHECKING:
    from agentgym_ig.lm.policy import LocalPolicy
    from agentgym_ig.trainers.config import TrainConfig
    from agentgym_ig.trainers.recipes import Recipe


def prepare_for_small_models() -> None:
    """One torch thread, and no bars for weights that load in a blink.

    For small models a second thread costs more than it brings, and beside a busy neighbour up to a hundred times
    more.
    """
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def places_of(
    suite: str, questions: Path | None, index: Sequence[str] | None
) -> tuple[Path | None, Sequence[str] | None]:
    """The folder of questions and the indexes that the user named, or else that a suite's file names."""
    if not suite.endswith((".yaml", ".yml")):
        return questions, index
    said = read_suite(Path(suite))
    return questions or said.questions, index or said.index


def open_suite(
    name: str,
    questions: Path | None,
    index: Sequence[str] | None,
    limit: int | None,
    overrides: Mapping[str, Any],
    seed: int = 0,
    *,
    split: str = "test",
) -> Suite:
    """A suite by name, or from a YAML file. TinyWiki and MiniWiki bring all they need; others need folders.

    `questions` holds `<dataset>.jsonl` or `.jsonl.gz` for at least one dataset of the suite; `limit` takes the
    first so many of each; `overrides` are fields of `Rules` that the user set; `split` is MiniWiki's.
    """
    if name.endswith((".yaml", ".yml")):
        said = read_suite(Path(name))
        found = _suite_of_files(
            said.name, said.domains, *places_of(name, questions, index), limit, {**said.rules, **overrides}
        )
        if lacking := [dataset for dataset in said.domains if dataset not in found.questions]:
            raise CorpusError(f"{questions or said.questions} holds no {lacking[0]}.jsonl or {lacking[0]}.jsonl.gz")
        return found
    domains = suite_datasets(name)
    if name == "miniwiki":
        return miniwiki_suite(split, limit, Rules(**overrides))
    if name == "tinywiki":
        from agentgym_ig.trainers.tinywiki import test_world, tinywiki_suite

        suite = tinywiki_suite(test_world(seed), limit or 150)
        return replace(suite, rules=replace(suite.rules, **overrides))
    return _suite_of_files(name, domains, questions, index, limit, overrides)


def _suite_of_files(
    name: str,
    domains: Domains,
    questions: Path | None,
    index: Sequence[str] | None,
    limit: int | None,
    rules: Mapping[str, Any],
) -> Suite:
    if questions is None or not index:
        raise ValueError(
            f"suite {name!r} needs --questions FOLDER (with {', '.join(domains)} as .jsonl) and --index FOLDER"
        )
    found: dict[str, list[Question]] = {}
    for dataset in domains:
        if (path := question_file(questions, dataset)) is not None:
            # Releases number each dataset from 0, so ids are told apart by the dataset's name.
            found[dataset] = [
                replace(question, id=f"{dataset}/{question.id}", dataset=dataset)
                for question in read_questions(path)[:limit]
            ]
    if not found:
        raise CorpusError(f"{questions} holds none of {', '.join(f'{dataset}.jsonl[.gz]' for dataset in domains)}")
    return Suite(name, found, open_indexes(index), Rules(**rules), domains)


def how_questions_were_made(questions: Path | None, suite: Suite) -> dict[str, Any]:
    """Dataset → the manifest beside its file of questions, for those that have one."""
    files = {name: question_file(questions, name) for name in suite.questions} if questions else {}
    return {name: read_manifest(path) for name, path in files.items() if path and manifest_path(path).is_file()}


def open_recipe(name: str, suite: str, *, kl: float | None, entropy: float | None) -> Recipe:
    """A recipe by name, TinyWiki's without a KL and entropy term, and with those weights that are given."""
    from agentgym_ig.trainers.recipes import recipe, with_kl
    from agentgym_ig.trainers.tinywiki import tiny_recipe

    chosen = tiny_recipe(name) if suite == "tinywiki" else recipe(name)
    chosen = chosen if kl is None else with_kl(chosen, kl)
    return chosen if entropy is None else replace(chosen, entropy=entropy)


def training_config(suite: str, given: Mapping[str, Any], recipe: Recipe, seed: int) -> TrainConfig:
    """A run's settings. `given` are the user's options: fields of `TrainConfig`, of which those that are None or False
    keep the suite's own, or the recipe's, and others.
    """
    from agentgym_ig.trainers.config import TrainConfig
    from agentgym_ig.trainers.tinywiki import tiny_config

    tiny = suite == "tinywiki"
    config = tiny_config(seed, preset=recipe.preset) if tiny else TrainConfig(seed=seed, **recipe.preset)
    options = {own.name: given.get(own.name) for own in fields(TrainConfig)}
    return replace(config, **{name: value for name, value in options.items() if not (value is None or value is False)})


def training_rules(suite: str, overrides: Mapping[str, Any], recipe: Recipe) -> Rules:
    """The rules that `open_training` would train under, without opening questions or an index."""
    if suite == "tinywiki":
        return replace(TINYWIKI_RULES, **overrides)
    if suite.endswith((".yaml", ".yml")):
        return _guided(Rules(**{**read_suite(Path(suite)).rules, **overrides}), recipe)
    suite_datasets(suite)
    return _guided(Rules(**overrides), recipe)


def _guided(rules: Rules, recipe: Recipe) -> Rules:
    return replace(rules, prompt=with_guide(rules.texts)) if "self_guide" in recipe.needs else rules


def open_training(
    suite: str,
    questions: Path | None,
    index: Sequence[str] | None,
    overrides: Mapping[str, Any],
    config: TrainConfig,
    *,
    recipe: Recipe,
    seed: int,
) -> VectorSearch:
    """The environment to train in: the suite's in-domain datasets, or a TinyWiki training world."""
    from agentgym_ig.trainers.tinywiki import training_env, training_world

    places = config.questions_per_step * config.group_size
    if suite == "tinywiki":
        made = training_env(training_world(seed), places)
        env = SearchVectorEnv(made.index, list(made.questions.values()), places, replace(made.rules, **overrides))
    else:
        asked = open_suite(suite, questions, index, None, overrides, split="train")
        own = {name: found for name, found in asked.questions.items() if asked.domains[name] == "in_domain"}
        if not own:
            raise ValueError(
                f"{questions} holds no in-domain dataset of suite {suite!r}, so there is nothing to train on"
            )
        env = replace(asked, questions=own, rules=_guided(asked.rules, recipe)).env(places)
    return add_channel(env, SelfGuide()) if "self_guide" in recipe.needs else env


SMALL = 20_000_000
"""Parameters up to which a model is taken for one like the shipped policy."""


def check_fits_suite(policy: LocalPolicy, suite: str, recipe: Recipe, learning_rate: float | None) -> None:
    """Raise ValueError where TinyWiki's settings would train another model badly, or a recipe would have no effect."""
    if suite != "tinywiki":
        return
    size = policy.model.num_parameters()
    if size > SMALL and learning_rate is None:
        raise ValueError(
            f"the model has {size:,} parameters, and TinyWiki's learning rate of 5e-4 is for one of 0.2 million; give"
            " --learning-rate and --max-new-tokens"
        )
    if "self_guide" in recipe.needs and "<guide>" not in policy.encoder.tokenizer.get_vocab():
        raise ValueError(
            "this model was never shown how to assess itself, so self-guide would be GRPO; train one to by supervised"
            " fine-tuning first, or take another suite, whose prompt asks for it"
        )


def open_trainable(
    name: str, device: str, lora_rank: int | None, *, seed: int, attention: str | None = None, liger: bool = False
) -> tuple[Any, Any]:
    """A model to be trained, in float32, with a fresh adapter if there is a rank, and its tokenizer.

    attention: its kernel by transformers' name. liger: whether it computes by Liger's kernels.
    """
    from agentgym_ig.trainers.adapters import with_lora
    from agentgym_ig.trainers.liger import with_liger
    from agentgym_ig.trainers.tinywiki import load_policy_model

    model, tokenizer = load_policy_model(name, device, attention)
    if liger:
        model = with_liger(model)
    if lora_rank is not None:
        model = with_lora(model, rank=lora_rank, alpha=2 * lora_rank, seed=seed)
    return model, tokenizer


def open_engine(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    max_cached_tokens: int,
) -> LocalPolicy:
    """A model's policy over one of the engines that generate with the very weights in training.

    `batch_size` and `max_cached_tokens` are of `transformers`; the other makes its batches and pages itself. Raises
    ValueError for any other.
    """
    from agentgym_ig.lm.policy import TransformersPolicy

    if name == "transformers":
        return TransformersPolicy(
            model,
            tokenizer,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_cached_tokens=max_cached_tokens,
        )
    if name == "continuous":
        from agentgym_ig.lm.continuous import ContinuousPolicy

        return ContinuousPolicy(model, tokenizer, temperature=temperature, max_new_tokens=max_new_tokens)
    if name == "server":
        raise ValueError(
            "a server would go on with the weights it was started with while training changes them; take --engine"
            " transformers or continuous. One whose weights you keep the same yourself goes in Run(engine=...),"
            " see docs/engines.md; to evaluate with a server: agentgym-ig eval --server URL"
        )
    raise ValueError(f"unknown engine {name!r}; choose transformers or continuous")


SCRIPTED = ("oracle", "closed-book", "retrieve-once", "multi-hop", "random")
"""Policies that need no model, by name."""


def open_scripted(name: str, suite: Suite) -> Policy:
    """One of `SCRIPTED`, for a suite."""
    if name == "random":
        return RandomPolicy()
    if name == "oracle":
        return open_oracle(suite)
    make = {"closed-book": closed_book, "retrieve-once": retrieve_once, "multi-hop": multi_hop}[name]
    return make(prompts_of(suite.env(1)))


def open_policy(
    name: str, *, device: str, temperature: float, max_new_tokens: int, server: str | None = None
) -> Policy:
    """A model's policy by the model's name or folder.

    With `server`, the address of an OpenAI-compatible server, the name is that server's for a model of its own; the
    key comes from the environment variable OPENAI_API_KEY.
    """
    if server is not None:
        from agentgym_ig.remote import OpenAIPolicy, OpenAIServer

        behind = OpenAIServer(server, name, api_key=os.environ.get("OPENAI_API_KEY"))
        return OpenAIPolicy(behind, temperature=temperature, max_tokens=max_new_tokens)
    from agentgym_ig.lm.policy import TransformersPolicy
    from agentgym_ig.trainers.tinywiki import load_policy_model

    model, tokenizer = load_policy_model(name, device)
    return TransformersPolicy(model, tokenizer, temperature=temperature, max_new_tokens=max_new_tokens)


def open_oracle(suite: Suite) -> Policy:
    """The oracle for a suite. Raises ValueError for an index that cannot list its passages, or lacks gold ones."""
    if not isinstance(suite.index, StoredIndex):
        raise ValueError(
            f"the oracle needs an index whose passages can be listed; {type(suite.index).__name__} has none"
        )
    env = suite.env(1)
    return oracle(prompts_of(env), gold_passages(suite.index, env.questions.values()))
