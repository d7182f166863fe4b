"""TRL as a host: our environments, channels, estimators and losses inside TRL's `GRPOTrainer` (extra `[trl]`).

TRL keeps what it is good at: sampling (transformers, continuous batching, vLLM), data parallelism, DeepSpeed, the fused
head, optimiser, checkpoints, logging. Two of its methods are overridden. `_generate_and_score_completions` puts (B, T)
advantages and token weights in place of TRL's, and `_compute_loss` is the recipe's. The episodes themselves are played
by TRL's own hook, a `rollout_func`. `docs/trl.md` says what maps to what.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from agentgym_ig.envs.rollout import Start, VectorSearch, rollout
from agentgym_ig.trainers.aggregation import Counts, count, token_weights
from agentgym_ig.trainers.collect import longest_episode
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.kl import kl_loss
from agentgym_ig.trainers.loop import Run, check_run, totals
from agentgym_ig.trainers.loss_statistics import loss_statistics, loss_sums
from agentgym_ig.trainers.recipes import Recipe
from agentgym_ig.trainers.trl_checks import check_columns, check_model, check_recipe, check_settings, check_trl
from agentgym_ig.trainers.trl_policy import HostedPolicy
from agentgym_ig.trainers.trl_rows import Hosted, check_same_rows, check_whole_groups, hosted, padded_advantages

try:
    import trl
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError(f"TRL cannot be imported ({error}); pip install 'agentgym_ig[trl]'") from error

FIGURES = (
    "em", "outcome", "turns", "searches", "answered", "malformed", "info_gain", "no_signal", "tokens_per_episode",
)  # fmt: skip
"""Of those that our own trainer logs; TRL itself logs `reward`."""


def question_dataset(env: VectorSearch, questions: Iterable[str] | None = None) -> Dataset:
    """TRL's dataset of the environment's questions, or of those with these ids: `prompt` for its logs, and `question`,
    the id that an episode is begun with.
    """
    ids = list(env.questions if questions is None else questions)
    return Dataset.from_dict({"prompt": [env.questions[own].text for own in ids], "question": ids})


def trl_settings(recipe: Recipe) -> dict[str, Any]:
    """Fields of a `GRPOConfig` that the recipe decides, and those of its preset that TRL has under another name."""
    names = {
        "learning_rate": "learning_rate",
        "warmup_steps": "warmup_steps",
        "group_size": "num_generations",
        "epochs": "num_iterations",
    }
    return {"beta": recipe.kl} | {names[own]: value for own, value in recipe.preset.items() if own in names}


def episode_reward(*, episode_reward: Sequence[float | None], **_: Any) -> list[float | None]:
    """TRL's reward function, for its logs: the reward that stands in the row."""
    return list(episode_reward)


def _rollout(prompts: Sequence[Any], trainer: SearchGRPOTrainer) -> dict[str, Any]:
    return trainer.play(len(prompts))


class SearchGRPOTrainer(GRPOTrainer):  # type: ignore[misc]  # TRL is untyped here
    """TRL's `GRPOTrainer`, playing a search environment and learning by a recipe.

    Args:
        model: as TRL takes it: a name, a folder or a model.
        env: a `SearchVectorEnv`, or one with channels around it.
        recipe: its estimator, loss, aggregation, KL and entropy take the place of TRL's.
        args: `max_completion_length` is the tokens of one *turn*; settings that the recipe replaces are refused.
        train_dataset: with the columns of `question_dataset`, by default that of all the environment's questions.
        aliases: which of the accepted answers the belief is about, as in `TrainConfig`.
        others: all else that a `GRPOTrainer` takes, but for rewards, tools and its other ways to roll out.

    Raises ImportError for a TRL that it was not written for, and ValueError for settings, recipes, models and datasets
    that do not go together.
    """

    def __init__(
        self,
        model: Any,
        *,
        env: VectorSearch,
        recipe: Recipe,
        args: GRPOConfig,
        train_dataset: Any = None,
        aliases: str = "first",
        **others: Any,
    ) -> None:
        check_trl(trl.__version__, GRPOTrainer)
        check_settings(args, recipe)
        check_recipe(recipe, args.world_size)
        train_dataset = question_dataset(env) if train_dataset is None else train_dataset
        for dataset in (train_dataset, others.get("eval_dataset")):
            check_columns(dataset)
        with warnings.catch_warnings():
            # That the hook may change is what check_trl is for.
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
            super().__init__(
                model=model,
                reward_funcs=episode_reward,
                args=args,
                train_dataset=train_dataset,
                rollout_func=_rollout,
                **others,
            )
        check_model(self, recipe)
        self.env, self.recipe, self.aliases = env, recipe, aliases
        self.sampler = HostedPolicy(self)
        self._asked: Sequence[Mapping[str, Any]] = ()
        self._evaluations = itertools.count()
        self._parts: list[list[float]] = []  # of the step's micro-batches so far, what is logged
        self.hosted: Hosted | None = None
        check_run(self._run())

    def play(self, prompts: int) -> dict[str, Any]:
        """What TRL's hook wants of the rows of this generation batch, an episode for each; logs figures of them."""
        starts = self._starts()
        if len(starts) != prompts:
            raise RuntimeError(f"TRL asks for {prompts} rollouts of a batch of {len(starts)} rows")
        run = self._run()
        episodes = rollout(self.env, self.sampler, starts)
        self.sampler.finish()
        with self.accelerator.autocast():
            self.hosted = hosted(run, episodes, self.state.global_step, self._tokenizer.pad_token_id)
        self._log_figures(self.hosted)
        rows = self.hosted.rows
        given = all(row.logprobs is not None for row in rows)
        return {
            "prompt_ids": [row.prompt_ids for row in rows],
            "completion_ids": [row.completion_ids for row in rows],
            "logprobs": [row.logprobs for row in rows] if given else None,
            "env_mask": [row.own for row in rows],
            "episode_reward": [row.reward for row in rows],
        }

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._asked = inputs
        made: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self.hosted is not None
        check_same_rows(made, self.hosted.rows)
        made["advantages"] = padded_advantages(self.hosted.rows, made["completion_ids"])
        made["token_weights"] = self._token_weights(_sampled(made))
        return made

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mask, recipe = _sampled(inputs), self.recipe
        logprobs, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            mask.shape[1],
            compute_entropy=True,
        )
        # Where TRL has read none, this is the policy that sampled.
        old = inputs.get("old_per_token_logps", logprobs.detach())
        terms = {"policy_loss": recipe.loss(logprobs, old, inputs["advantages"], mask=mask)}
        if "importance_sampling_ratio" in inputs:  # from vLLM's distribution to the model's, (B, C) or (B, 1)
            terms["policy_loss"] = terms["policy_loss"] * inputs["importance_sampling_ratio"]
        if recipe.kl:
            reference = inputs["ref_per_token_logps"]
            terms["kl_loss"] = recipe.kl * kl_loss(logprobs, reference, recipe.kl_estimator, mask=mask)
        if recipe.entropy:
            terms["entropy_loss"] = -recipe.entropy * entropies
        totals = {name: (own * inputs["token_weights"]).sum() for name, own in terms.items()}
        sums = loss_sums(recipe.loss, logprobs.detach(), old, inputs["advantages"], mask=mask)
        sums |= {"entropy": float(entropies.detach()[mask].sum()), "sampled": float(mask.sum())}
        self._log_loss({name: float(own.detach()) for name, own in totals.items()}, sums)
        return torch.stack(list(totals.values())).sum()

    def _starts(self) -> list[Start]:
        """An episode for each row. Groups and seeds do not depend on how many processes share the rows of all."""
        if lacking := [row for row in self._asked if "question" not in row]:
            raise ValueError(
                f"a row has no `question` but {', '.join(lacking[0])}; make rows with question_dataset(env)"
            )
        questions = [row["question"] for row in self._asked]
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        check_whole_groups(questions, size)
        first, rows = self.accelerator.process_index * len(questions), len(questions) * self.accelerator.num_processes
        key = (self.args.seed, self.state.global_step, *(() if training else (1, next(self._evaluations))))
        seeds = np.random.default_rng(key).integers(2**62, size=rows).tolist()
        return [Start(own, row // size, seeds[row]) for row, own in enumerate(questions, first)]

    def _run(self) -> Run:
        """What our own trainer would call this run: the recipe reads its settings there."""
        config = TrainConfig(
            steps=max(self.state.max_steps, 1),
            group_size=self.num_generations,
            micro_batch=self.args.per_device_train_batch_size,
            aliases=self.aliases,
        )
        return Run(self.sampler, self.env, self.recipe, config, Path(self.args.output_dir))

    def _token_weights(self, mask: Tensor) -> Tensor:
        """(B, C) each token's share of the loss of the optimiser step that it will be in.

        Counted over the generation batch of all processes. Where several steps are made of one, each has an equal part
        of it, at random, and the counts are taken to be equal too, as in TRL's own `dapo`.
        """
        own = count(mask)
        everywhere = self._sum([own.tokens, own.episodes])
        step = Counts(*map(int, everywhere))
        weights = token_weights(
            mask, self.recipe.aggregation, width=max(step.episodes, 1) * longest_episode(self._run()), step=step
        )
        steps = self.args.steps_per_generation // self.args.gradient_accumulation_steps if self.model.training else 1
        # Gradients are averaged over processes.
        scale: int = steps * self.accelerator.num_processes
        return (weights * scale).float()

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes."""
        own = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        summed: list[float] = self.accelerator.reduce(own, "sum").tolist()
        return summed

    def _log(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _log_figures(self, played: Hosted) -> None:
        """What the episodes of all processes were like, as `metrics.jsonl` has it: means over those learned from."""
        figures = dict.fromkeys(FIGURES, 0.0)
        if played.batch and played.learned:
            figures |= {name: own for name, own in totals(played.batch, played.learned).items() if name in figures}
        kept = len(played.rows) - played.failed
        *sums, failed, learned = self._sum([*figures.values(), played.failed, kept])
        self._log({name: own / max(learned, 1) for name, own in zip(figures, sums, strict=True)})
        self._log({"episodes_failed": failed})

    def _log_loss(self, totals: Mapping[str, float], sums: Mapping[str, float]) -> None:
        """Terms of the loss and what it did to its tokens, logged at the last micro-batch of a step for all of it."""
        self._parts.append([*totals.values(), *sums.values()])
        if len(self._parts) < (self.args.gradient_accumulation_steps if self.model.training else 1):
            return
        everywhere = self._sum(np.sum(self._parts, 0).tolist())
        self._parts.clear()
        processes = self.accelerator.num_processes  # as the gradients, the terms are averaged over them
        self._log({name: own / processes for name, own in zip(totals, everywhere, strict=False)})
        counted = dict(zip(sums, everywhere[len(totals) :], strict=True))
        tokens = max(counted.pop("sampled"), 1.0)
        self._log({"entropy": counted.pop("entropy") / tokens, **loss_statistics([counted])})


def _sampled(made: Mapping[str, Tensor]) -> Tensor:
    """(B, C) bool: the tokens that the policy wrote and that are trained on."""
    return (made["completion_mask"] * made["tool_mask"]).bool()
