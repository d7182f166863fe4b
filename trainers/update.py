"""The second half of a training step: optimiser steps over a batch, with any loss, in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agentgym_ig.trainers.aggregation import token_weights
from agentgym_ig.trainers.batch import TokenBatch, pad
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.critic import value_loss
from agentgym_ig.trainers.experience import Experience
from agentgym_ig.trainers.kl import kl_loss
from agentgym_ig.trainers.learner import Learner, precision, take_step
from agentgym_ig.trainers.loss_statistics import loss_statistics, loss_sums
from agentgym_ig.trainers.recipes import Recipe
from agentgym_ig.trainers.scoring import token_entropies, token_logprobs


class Update:
    """Optimiser steps of a recipe on a learner.

    temperature: that of the policy. longest: tokens that an episode's actions can have at most, which the aggregation
    `seq-mean-token-sum-norm` divides by.
    """

    def __init__(
        self, learner: Learner, recipe: Recipe, config: TrainConfig, *, temperature: float, longest: int
    ) -> None:
        self.learner, self.recipe, self.config = learner, recipe, config
        self.temperature, self.longest = temperature, longest

    def __call__(self, learned: Experience, step: int) -> dict[str, float]:
        """Go through the experience `epochs` times, `updates_per_step` optimiser steps each, over its own part of the
        episodes. Returns the mean figures of the steps that were taken, and how many were skipped.
        """
        stats: list[dict[str, float]] = []
        skipped = 0
        for epoch in range(self.config.epochs):
            order = np.random.default_rng((self.config.seed, step, 1, epoch)).permutation(len(learned.encoded))
            for part in np.array_split(order, min(self.config.updates_per_step, len(order))):
                try:
                    stats.append(self.step(learned, part.tolist()))
                except FloatingPointError:
                    self.learner.optimizer.zero_grad()
                    skipped += 1
        names = stats[0] if stats else {}
        figures = {name: math.fsum(own[name] for own in stats) / len(stats) for name in names}
        return figures | {"updates": len(stats), "skipped_updates": skipped}

    def step(self, learned: Experience, rows: Sequence[int]) -> dict[str, float]:
        """One optimiser step over some of the episodes, and its figures.

        Every token's weight is fixed over all of them before they are cut into micro-batches. Raises
        FloatingPointError, before anything has changed, when the loss or a gradient is not finite.
        """
        rows = sorted(rows, key=lambda row: len(learned.encoded[row].ids))
        sampled = pad([learned.encoded[row] for row in rows]).sampled
        weights = token_weights(sampled, self.recipe.aggregation, width=len(rows) * self.longest)
        totals: dict[str, float] = {"tokens": float(sampled.sum())}
        parts: list[dict[str, float]] = []
        self.learner.optimizer.zero_grad()
        for first in range(0, len(rows), self.config.micro_batch):
            some = rows[first : first + self.config.micro_batch]
            batch, columns = learned.rows(some, self.learner.model.device)
            weight = weights[first : first + len(some), : batch.ids.shape[1]].to(batch.ids.device, torch.float32)
            terms, sums = self._terms(batch, columns)
            loss = torch.stack([(own * weight).sum() for own in terms.values()]).sum()
            loss.backward()
            parts.append(sums)
            for name, own in terms.items():
                totals[name] = totals.get(name, 0.0) + float((own.detach() * weight).sum())
        norms = take_step(self.learner, list(totals.values()), self.config.max_grad_norm)
        return totals | dict(zip(("grad_norm", "critic_grad_norm"), norms, strict=False)) | loss_statistics(parts)

    def _terms(self, batch: TokenBatch, columns: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(B, T) each term of the loss, its coefficient included, and what the policy loss did to its tokens."""
        model, recipe, mask = self.learner.model, self.recipe, batch.sampled
        entropies: Tensor | None = None
        with precision(self.config, batch.ids.device):
            if recipe.entropy:
                logprobs, entropies = token_entropies(model, batch, self.temperature, wanted=mask)
            else:
                logprobs = token_logprobs(model, batch, self.temperature, wanted=mask)
            values = self.learner.critic.values(batch) if self.learner.critic is not None else None
        old, advantages = columns["old"], columns["advantages"]
        terms = {"policy_loss": recipe.loss(logprobs, old, advantages, mask=mask)}
        if "importance" in columns:
            terms["policy_loss"] = terms["policy_loss"] * columns["importance"]
        if recipe.kl:
            terms["kl_loss"] = recipe.kl * kl_loss(logprobs, columns["reference"], recipe.kl_estimator, mask=mask)
        if entropies is not None:
            terms["entropy_loss"] = -recipe.entropy * entropies
        if values is not None:
            terms["value_loss"] = value_loss(values.float(), columns["returns"], columns["values"], mask=mask)
        return terms, loss_sums(recipe.loss, logprobs.detach(), old, advantages, mask=mask)
