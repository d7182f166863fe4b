"""Training: advantages and losses as pure functions, likelihoods, recipes, a loop that fits on one screen."""

from agentgym_ig.trainers.advantages import grpo_advantages, igpo_advantages, igpo_gae_advantages, standardise
from agentgym_ig.trainers.aggregation import token_weights
from agentgym_ig.trainers.batch import PackedBatch, Stem, TokenBatch, pack, pad
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.estimators import (
    GRPO,
    IGPO,
    PPO,
    RLOO,
    BeliefGAE,
    DrGRPO,
    Estimator,
    GiGPO,
    GraphGPO,
    ReinforcePP,
    ReinforcePPBaseline,
    SelfGuide,
    Sum,
)
from agentgym_ig.trainers.experience import Batch, TokenAdvantages
from agentgym_ig.trainers.kl import kl_loss, kl_penalty
from agentgym_ig.trainers.loop import Run, train
from agentgym_ig.trainers.losses import (
    LOSSES,
    PolicyLoss,
    cispo_loss,
    clipped_loss,
    gipo_loss,
    gspo_loss,
    gspo_token_loss,
    sapo_loss,
)
from agentgym_ig.trainers.online import OnlineScorer
from agentgym_ig.trainers.recipes import PARTS, Recipe, recipe
from agentgym_ig.trainers.scoring import Scorer, token_logprobs
from agentgym_ig.trainers.state_graph import gigpo_advantages, graph_gpo_advantages
from agentgym_ig.trainers.token_advantages import gae_advantages, reinforce_pp_advantages

__all__ = [
    "GRPO",
    "IGPO",
    "LOSSES",
    "PARTS",
    "PPO",
    "RLOO",
    "Batch",
    "BeliefGAE",
    "DrGRPO",
    "Estimator",
    "GiGPO",
    "GraphGPO",
    "OnlineScorer",
    "PackedBatch",
    "PolicyLoss",
    "Recipe",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "Run",
    "Scorer",
    "SelfGuide",
    "Stem",
    "Sum",
    "TokenAdvantages",
    "TokenBatch",
    "TrainConfig",
    "cispo_loss",
    "clipped_loss",
    "gae_advantages",
    "gigpo_advantages",
    "gipo_loss",
    "graph_gpo_advantages",
    "grpo_advantages",
    "gspo_loss",
    "gspo_token_loss",
    "igpo_advantages",
    "igpo_gae_advantages",
    "kl_loss",
    "kl_penalty",
    "pack",
    "pad",
    "recipe",
    "reinforce_pp_advantages",
    "sapo_loss",
    "standardise",
    "token_logprobs",
    "token_weights",
    "train",
]
