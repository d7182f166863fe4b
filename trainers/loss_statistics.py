"""What a policy loss does to a step's tokens, for any loss: read off its own gradient, so never at odds with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from agentgym_ig.trainers.losses import PolicyLoss
from agentgym_ig.trainers.masked import bounded, on_mask

DAMPED = 0.1
"""A token counts as damped when it pulls less than this share of what plain importance sampling would."""


def gradient_factors(
    loss: PolicyLoss, logprobs: Tensor, old: Tensor, advantages: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """How hard each token is pulled for its advantage: its loss's gradient by its log-probability, over -A.

    1 for all on policy; PPO's is ρ or 0, GIPO's ω ρ. Arguments as those of a loss. Returns their shape, detached,
    0 off the mask and where the advantage is 0. The loss must be linear in the size of A, as all of ours are.
    """
    sign = advantages.detach().sign()
    with torch.enable_grad():
        own = logprobs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(own, old.detach(), sign, mask=mask).sum(), own)
    factors = -gradient * sign
    return factors if mask is None else factors.masked_fill(~mask, 0.0)


def loss_sums(
    loss: PolicyLoss, logprobs: Tensor, old: Tensor, advantages: Tensor, *, mask: Tensor | None = None
) -> dict[str, float]:
    """Sums over the tokens on the mask that have an advantage, from which `loss_statistics` are made.

    Arguments and errors as those of a loss. The sums of parts of a step, or of ranks, add up to those of the whole.
    """
    mask, (own, before, scored) = on_mask(mask, logprobs=logprobs, old=old, advantages=advantages)
    pulled = mask & (scored != 0)
    factor = gradient_factors(loss, own, before, scored, mask=mask)[pulled].double()
    x = bounded((own - before).detach())[pulled].double()
    trust = factor / x.exp()
    columns = {
        "tokens": torch.ones_like(x),
        "cut": (factor == 0).double(),
        "damped": (trust < DAMPED).double(),
        "trust": trust,
        "ratio": x.exp(),
        "kl": x.expm1() - x,
        "factor": factor,
        "factor_squared": factor.square(),
    }
    sums: list[float] = torch.stack(list(columns.values())).sum(1).tolist()
    return dict(zip(columns, sums, strict=True))


def loss_statistics(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Figures to log, given the `loss_sums` of all parts of a step. They are about tokens that have an advantage.

    cut: share without any gradient (PPO's clip fraction). damped: share whose factor is below a tenth of its ratio.
    trust: mean of factor over ratio (GIPO's ω). ratio: mean ratio. kl: estimate of KL(old ‖ policy), nats per token,
    by ρ - 1 - log ρ. effective: effective sample size of the factors over their number, (Σ w)² / (n Σ w²).
    All are 0 when no token has an advantage; effective also when all are cut.
    """
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    count = max(total.get("tokens", 0.0), 1.0)
    figures = {name: total.get(name, 0.0) / count for name in ("cut", "damped", "trust", "ratio", "kl")}
    squares = total.get("factor_squared", 0.0)
    return figures | {"effective": total["factor"] ** 2 / (count * squares) if squares else 0.0}
