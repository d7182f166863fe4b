"""What the TRL host asks of TRL, of its settings and of a recipe; each check raises before anything is trained."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from packaging.version import Version

from agentgym_ig.trainers.estimators import ReinforcePP, ReinforcePPBaseline
from agentgym_ig.trainers.recipes import Recipe

OLDEST, TOO_NEW = "1.16", "2"

HOOKS: dict[str, tuple[str, ...]] = {
    "__init__": ("rollout_func", "reward_funcs"),
    "_generate_and_score_completions": ("inputs",),
    "_compute_loss": ("model", "inputs"),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "num_generations"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "compute_entropy"),
}
"""Method of `GRPOTrainer` → the parameters it is called with. The second and third are overridden."""

REPLACED = (
    "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "scale_rewards",
    "multi_objective_aggregation", "reward_weights", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos",
    "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "entropy_coef", "use_adaptive_entropy",
    "use_bias_correction_kl",
)  # fmt: skip
"""Settings of TRL's advantages and losses: the recipe says these, so they would have no effect."""

UNKNOWN = ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs")
"""Settings under which tokens come from another distribution than the one whose log-probabilities are trained."""

UNFIT = ("top_entropy_quantile", "off_policy_mask_threshold", "mask_truncated_completions", "chat_template_kwargs")
"""Settings that our loss and our conversations have no place for: a token is trained on if the policy wrote it."""

_WHY = {
    REPLACED: "would have no effect: the recipe says what advantages and loss are",
    UNKNOWN: "would sample from another distribution than the one that is trained",
    UNFIT: "is not known to the host",
}


def check_trl(version: str, trainer: type) -> None:
    """Raise ImportError for a TRL outside the range that this was written for, or without a method that it calls."""
    want = f"wanted trl>={OLDEST},<{TOO_NEW}: pip install 'agentgym_ig[trl]'"
    if not Version(OLDEST) <= Version(version) < Version(TOO_NEW):
        raise ImportError(f"found trl {version}; {want}")
    for name, parameters in HOOKS.items():
        method = getattr(trainer, name, None)
        lacking = set(parameters) - set(inspect.signature(method).parameters if method else ())
        if lacking:
            what = f"{trainer.__name__}.{name}" + (f" without {', '.join(sorted(lacking))}" if method else " missing")
            raise ImportError(f"trl {version} has {what}, which the host is built on; {want}, or an earlier one of it")


def check_settings(args: Any, recipe: Recipe) -> None:
    """Raise ValueError for settings of TRL's that the recipe takes the place of, or that cannot be kept to."""
    defaults = {own.name: own.default for own in fields(args) if own.default is not MISSING}
    for names, why in _WHY.items():
        changed = [f"{name}={getattr(args, name)!r}" for name in names if getattr(args, name) != defaults[name]]
        if changed:
            raise ValueError(f"{', '.join(changed)} {why}; leave it out of the GRPOConfig")
    if args.beta != recipe.kl:
        raise ValueError(
            f"beta={args.beta}, but the recipe's kl is {recipe.kl}; take GRPOConfig(..., **trl_settings(recipe)), or"
            " with_kl(recipe, 0)"
        )
    if not args.temperature > 0:
        raise ValueError(f"temperature={args.temperature} samples no alternatives to learn from; use one above 0")
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise ValueError(
            f"steps_per_generation={args.steps_per_generation} is no multiple of gradient_accumulation_steps="
            f"{args.gradient_accumulation_steps}: a token's share of an update would not be known; make it one"
        )
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if rows % args.num_generations:
        raise ValueError(
            f"each process plays {rows} episodes (per_device_train_batch_size={args.per_device_train_batch_size} times"
            f" steps_per_generation={args.steps_per_generation}), which are no whole groups of num_generations="
            f"{args.num_generations}; make them a multiple of it"
        )


def check_recipe(recipe: Recipe, processes: int) -> None:
    """Raise ValueError for a recipe that TRL's trainer has no place for."""
    reads = recipe.reads | getattr(recipe.estimator, "reads", frozenset())
    if "values" in reads:
        raise ValueError("this recipe trains a critic, which TRL's GRPOTrainer has no place for; use trainers.train")
    if "reference" in reads:
        raise ValueError(
            "this recipe's estimator reads the reference model, whose log-probabilities TRL makes for the loss alone;"
            " take with_kl(recipe, 0), or use trainers.train"
        )
    if recipe.sampling_rounds > 1:
        raise ValueError(
            "this recipe draws groups without signal again, but TRL plays each row of its dataset once; take"
            " replace(recipe, sampling_rounds=1)"
        )
    if processes > 1 and isinstance(recipe.estimator, ReinforcePP | ReinforcePPBaseline):
        raise ValueError(
            "this recipe's estimator whitens over the whole batch, of which each process has a part; use one process"
        )


def check_model(trainer: Any, recipe: Recipe) -> None:
    """Raise ValueError for a model whose parts cannot be read or trained as the recipe wants."""
    if trainer.aux_loss_enabled:
        raise ValueError("the loss of a model's router is left to TRL's own loss; set router_aux_loss_coef=0.0")
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    if "info_gain" in recipe.needs and (trainer.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)):
        raise ValueError(
            "information gain is read with the whole model, but FSDP and DeepSpeed's ZeRO-3 cut it up; take DDP or"
            " ZeRO-2, or a recipe without information gain"
        )


def check_columns(dataset: Any) -> None:
    """Raise ValueError for a dataset that does not say which question a row is about."""
    columns = getattr(dataset, "column_names", None)
    if columns is not None and (lacking := {"prompt", "question"} - set(columns)):
        raise ValueError(
            f"the dataset has no column {' and no '.join(sorted(lacking))} but {', '.join(columns)}; make it with"
            " question_dataset(env), or give `question` the ids of the environment's questions"
        )
