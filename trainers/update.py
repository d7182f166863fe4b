"""The second half of a training step: optimiser steps over a batch, with any loss, in micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agentgym_ig.trainers import ranks
from agentgym_ig.trainers.aggregation import token_weights
from agentgym_ig.trainers.batch import TokenBatch, pad
from agentgym_ig.trainers.config import TrainConfig
from agentgym_ig.trainers.critic import value_loss
from agentgym_ig.trainers.experience import Experience
from agentgym_ig.trainers.kl import kl_loss
from agentgym_ig.trainers.learner import Learner, precision, take_step
from agentgym_ig.trainers.loss_statistics import loss_statistics, loss_sums
from agentgym_ig.trainers.packing import packing
from agentgym_ig.trainers.recipes import Recipe
from agentgym_ig.trainers.scoring import token_entropies
from agentgym_ig.trainers.sharding import averaged_over


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
        self.learner.optimizer.zero_grad()  # the next rollout needs their memory
        names = stats[0] if stats else {}
        figures = {name: math.fsum(own[name] for own in stats) / len(stats) for name in names}
        return figures | {"updates": len(stats), "skipped_updates": skipped}

    def step(self, learned: Experience, rows: Sequence[int]) -> dict[str, float]:
        """One optimiser step over some of the episodes, and its figures.

        Every token's weight is fixed over all of them before they are cut into micro-batches. Raises
        FloatingPointError, before anything has changed, when the loss or a gradient is not finite.
        """
        sampled = pad([learned.encoded[row] for row in rows]).sampled
        weights = token_weights(sampled, self.recipe.aggregation, width=len(rows) * self.longest)
        totals, parts = self.learner.updating.of(lambda size: self._gradients(learned, rows, weights, size))
        totals = ranks.sums(totals)
        norms = take_step(self.learner, list(totals.values()), self.config.max_grad_norm)
        statistics = loss_statistics(part for own in ranks.gather(parts) for part in own)
        norms_by_name = dict(zip(("grad_norm", "critic_grad_norm"), norms, strict=False))
        return {"tokens": float(sampled.sum())} | totals | norms_by_name | statistics

    def _gradients(
        self, learned: Experience, rows: Sequence[int], weights: Tensor, size: int
    ) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Make this rank's part of the gradient, in passes over at most `size` episodes; returns its part of each loss
        term, and each pass's `loss_sums`. weights: (rows, T).
        """
        totals: dict[str, float] = {}
        parts: list[dict[str, float]] = []
        self.learner.optimizer.zero_grad()
        for chosen in ranks.micro_batches([len(learned.encoded[row].ids) for row in rows], size):
            # An empty pass keeps the other ranks company: its one row counts nothing.
            batch, columns = learned.rows([rows[place] for place in chosen or [0]], self.learner.model.device)
            share = weights[chosen] if chosen else torch.zeros_like(weights[:1])
            weight = share[:, : batch.ids.shape[1]].to(batch.ids.device, torch.float32)
            with packing(self.learner.model, self.learner.critic and self.learner.critic.trunk):
                terms, sums = self._terms(batch, columns)
                loss = torch.stack([(own * weight).sum() for own in terms.values()]).sum()
                (loss * averaged_over(self.learner.model)).backward()
            parts += [sums] if chosen else []
            for name, own in terms.items():
                totals[name] = totals.get(name, 0.0) + float((own.detach() * weight).sum())
        return totals, parts

    def _terms(self, batch: TokenBatch, columns: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """(B, T) each term of the loss, its coefficient included, and what the policy loss did to its tokens.

        Where something is not finite, one rank raises FloatingPointError; several would lose each other, so there the
        terms are nan, and all ranks find the gradient not to be finite.
        """
        model, mask = self.learner.model, batch.sampled
        with precision(self.config, batch.ids.device):
            logprobs, entropies = token_entropies(model, batch, self.temperature, wanted=mask)
            values = self.learner.critic(batch) if self.learner.critic is not None else None
        try:
            return self._terms_of(logprobs, entropies, values, columns, mask)
        except FloatingPointError:
            if ranks.count() == 1:
                raise
            read = logprobs if values is None else logprobs + values.float()
            return {"policy_loss": read * torch.nan}, {}

    def _terms_of(
        self,
        logprobs: Tensor,
        entropies: Tensor,
        values: Tensor | None,
        columns: dict[str, Tensor],
        mask: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        recipe, old, advantages = self.recipe, columns["old"], columns["advantages"]
        terms = {"policy_loss": recipe.loss(logprobs, old, advantages, mask=mask)}
        if "importance" in columns:
            terms["policy_loss"] = terms["policy_loss"] * columns["importance"]
        if recipe.kl:
            terms["kl_loss"] = recipe.kl * kl_loss(logprobs, columns["reference"], recipe.kl_estimator, mask=mask)
        if recipe.entropy:
            terms["entropy_loss"] = -recipe.entropy * entropies
        if values is not None:
            terms["value_loss"] = value_loss(values.float(), columns["returns"], columns["values"], mask=mask)
        return terms, loss_sums(recipe.loss, logprobs.detach(), old, advantages, mask=mask)
