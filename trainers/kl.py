"""Estimates, token by token, of KL(policy ‖ reference) from the log-probabilities of sampled tokens alone.

Schulman 2020, "Approximating KL divergence"; names as in verl's `kl_penalty`. x = reference - policy, in nats:

| name | value | its gradient by the policy's log-probability | |
|---|---|---|---|
| k1  | -x          | 1         | right on average, of either sign |
| abs | abs(x)      | -sign(x)  | a distance, not an estimate |
| k2  | x² / 2      | -x        | |
| k3  | e^x - x - 1 | 1 - e^x   | right on average, never negative |

A value that is right on average need not have a gradient that is: k1 as a loss term pushes nowhere (its gradient is
that of a log-probability, 0 on average), k3 pushes as KL(reference ‖ policy) would; k2's gradient is the one that is
right for tokens sampled from the policy. So a trailing "+" (`k1+`, `abs+`, `k3+`) keeps the value and takes k2's
gradient, as in verl.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from agentgym_ig.trainers.masked import bounded, on_mask


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per token, an estimate of KL(policy ‖ reference) that is never negative: e^x - x - 1 with x = reference - policy
    (Schulman 2020, "Approximating KL divergence", k3). Inputs in nats; x is clamped to ± 20.

    verl also clamps the result to ± 10, which ends the pull where the policy has gone farthest; here it is not.
    """
    return _k3(bounded(reference - logprobs))


def _k3(x: Tensor) -> Tensor:
    return x.expm1() - x  # not exp(x) - 1 - x, which cancels to noise near 0


def _k2(x: Tensor) -> Tensor:
    return x.square() / 2


def _k2_gradient(value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`value`, with the gradient of k2."""
    return lambda x: value(x).detach() + (_k2(x) - _k2(x).detach())


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"k1": lambda x: -x, "abs": lambda x: x.abs(), "k2": _k2, "k3": _k3}
KL_ESTIMATORS = _PLAIN | {f"{name}+": _k2_gradient(value) for name, value in _PLAIN.items() if name != "k2"}
"""Functions of x = reference - policy."""


def kl_loss(logprobs: Tensor, reference: Tensor, estimator: str = "k3", *, mask: Tensor | None = None) -> Tensor:
    """A loss term: the KL of each token, with its gradient by `logprobs`. The reference gets none.

    logprobs, reference, mask: one shape, nats. Returns that shape, 0 off the mask; times a coefficient it is added
    to the policy loss before tokens are weighted. x is clamped to ± 20, where the gradient ends.
    Raises ValueError for another estimator or unequal shapes, FloatingPointError for what is not finite.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")
    _, (own, other) = on_mask(mask, logprobs=logprobs, reference=reference.detach())
    return KL_ESTIMATORS[estimator](bounded(other - own))


def kl_penalty(
    logprobs: Tensor, reference: Tensor, estimator: str = "k1", *, coefficient: float, mask: Tensor | None = None
) -> Tensor:
    """A reward: -coefficient times the KL of each token, without gradient (Ouyang et al. 2022, eq. 2, with k1).

    Shapes and errors as in `kl_loss`. `logprobs` are those of the policy that sampled the tokens.
    """
    if not coefficient >= 0:
        raise ValueError(f"coefficient={coefficient}; wanted 0 or more, or drifting away would be rewarded")
    return -coefficient * kl_loss(logprobs.detach(), reference, estimator, mask=mask)
