"""PPO's value function (Schulman et al. 2017, arXiv 1707.06347): what an episode is expected to bring, per token."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agentgym_ig.lm.alone import alone_with
from agentgym_ig.lm.encode import Encoded
from agentgym_ig.trainers.adapters import is_adapted
from agentgym_ig.trainers.batch import TokenBatch
from agentgym_ig.trainers.masked import on_mask, require
from agentgym_ig.trainers.modes import read_tokens
from agentgym_ig.trainers.packing import inputs_of, packing
from agentgym_ig.trainers.readout import Model


class Critic(nn.Module):
    """A copy of a policy's transformer with one output, in float32, that begins at 0.

    It shares no weight with the policy, so neither's gradient reaches the other. All of its weights are trainable, and
    it is made in evaluation mode. Of a policy with an adapter it copies the model below that.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        with alone_with(model):
            self.trunk: Model = (
                copy.deepcopy(model).unload().get_decoder() if is_adapted(model) else copy.deepcopy(model.get_decoder())
            )
        self.trunk.float().requires_grad_(True)
        width = model.get_output_embeddings().weight.shape[1]
        self.head = nn.Linear(width, 1, device=model.device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.eval()

    def forward(self, batch: TokenBatch) -> Tensor:
        """(B, T) the return expected from before each token that the policy wrote; 0 at all others. Differentiable.

        It is read behind the token before, so it knows all that the policy knew when it chose the token, and not
        the token. At the first token of an episode, which has none before it, it is 0.
        """
        row, before = batch.sampled[:, 1:].nonzero(as_tuple=True)
        inputs, places = inputs_of(self.trunk, batch.ids, batch.real, (row, before))
        hidden = self.trunk(**inputs).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):  # under which a value would keep three digits
            values: Tensor = self.head(hidden[places].float())[:, 0]
        return values.new_zeros(batch.ids.shape).index_put((row, before + 1), values)


def read_values(critic: Critic, encoded: Sequence[Encoded], *, batch_size: int = 64) -> list[Tensor]:
    """(T,) what the critic says of each episode; no gradient, evaluation mode, `batch_size` episodes at a time."""
    with packing(critic.trunk):
        return read_tokens(critic, critic, encoded, batch_size=batch_size)


def value_loss(
    values: Tensor, returns: Tensor, old: Tensor, *, mask: Tensor | None = None, clip: float | None = 0.2
) -> Tensor:
    """max((V - R)², (clip(V, old - clip, old + clip) - R)²) / 2 per token, V alone with a gradient.

    The clip, in units of the return, None for none, is that of OpenAI's PPO2, and not in the paper. It ends the
    gradient of a value that has gone past it towards R; one that has gone past it away from R is pulled back.

    values, returns, old, mask: one shape, (B, T) in the trainers; `old` are the values before the first update on
    the batch, `returns` those of `gae_advantages`. Returns that shape, 0 off the mask, where nan too changes nothing.
    Raises ValueError for unequal shapes and a clip not above 0, FloatingPointError for what is not finite.
    """
    _, (value, target, before) = on_mask(mask, values=values, returns=returns.detach(), old=old.detach())
    error = (value - target).square()
    if clip is not None:
        require("clip", clip, 0.0, math.inf)
        error = torch.maximum(error, (value.clamp(before - clip, before + clip) - target).square())
    return error / 2
