"""Training: advantages and losses as pure functions, likelihoods, and a loop that can be read on one screen."""

from agentgym_ig.trainers.advantages import grpo_advantages, igpo_advantages, standardise
from agentgym_ig.trainers.batch import PackedBatch, Stem, TokenBatch, pack, pad
from agentgym_ig.trainers.loop import Run, TrainConfig, train
from agentgym_ig.trainers.losses import clipped_loss, kl_k3, token_weights
from agentgym_ig.trainers.online import OnlineScorer
from agentgym_ig.trainers.recipes import GRPO, IGPO, RECIPES, Estimator, recipe
from agentgym_ig.trainers.scoring import Scorer, token_logprobs

__all__ = [
    "GRPO",
    "IGPO",
    "RECIPES",
    "Estimator",
    "OnlineScorer",
    "PackedBatch",
    "Run",
    "Scorer",
    "Stem",
    "TokenBatch",
    "TrainConfig",
    "clipped_loss",
    "grpo_advantages",
    "igpo_advantages",
    "kl_k3",
    "pack",
    "pad",
    "recipe",
    "standardise",
    "token_logprobs",
    "token_weights",
    "train",
]
