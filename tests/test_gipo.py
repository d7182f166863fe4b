"""GIPO's trust weight: golden vectors, its properties one by one, and two worked worlds of bias and variance."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from agentgym_ig.trainers.aggregation import token_weights
from agentgym_ig.trainers.loss_statistics import gradient_factors, loss_statistics, loss_sums
from agentgym_ig.trainers.losses import PolicyLoss, clipped_loss, gipo_log_omega, gipo_loss, sapo_loss
from tests.loss_batches import TIGHT, Batch, gradient, tensor

log_ratios = st.integers(-6 * 16, 6 * 16).map(lambda i: i / 16)
sigmas = st.sampled_from([0.1, 0.2, 0.5, 1.0, 2.0])
advantages_of = st.integers(-24, 24).map(lambda i: i / 8)


def omega(x: Tensor, **options: Any) -> Tensor:
    return gipo_log_omega(x, torch.ones_like(x), **options).exp()


def factor(x: Tensor, **options: Any) -> Tensor:
    """ω ρ: what the gradient of a token of advantage 1 is multiplied with."""
    return gradient_factors(partial(gipo_loss, **options), x, torch.zeros_like(x), torch.ones_like(x))


RATIOS = [0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0]
# sigma → per ratio ω, ω ρ, and the factor that would come of not detaching ω
WEIGHTS: dict[float, list[tuple[float, float, float]]] = {
    0.5: [
        (0.021416, 0.005354, 0.035043), (0.382546, 0.191273, 0.721595), (0.905212, 0.724170, 1.370545), (1, 1, 1),
        (0.905212, 1.131515, 0.121554), (0.382546, 0.765092, -1.356194), (0.021416, 0.085663, -0.389355),
    ],
    1.0: [
        (0.382546, 0.095637, 0.228217), (0.786450, 0.393225, 0.665788), (0.975411, 0.780329, 0.954454), (1, 1, 1),
        (0.975411, 1.219264, 0.947193), (0.786450, 1.572899, 0.482649), (0.382546, 1.530185, -0.591102),
    ],
    2.0: [
        (0.786450, 0.196612, 0.264753), (0.941711, 0.470856, 0.552449), (0.993795, 0.795036, 0.839388), (1, 1, 1),
        (0.993795, 1.242244, 1.172944), (0.941711, 1.883422, 1.557050), (0.786450, 3.145799, 2.055548),
    ],
}  # fmt: skip


@pytest.mark.parametrize("sigma", WEIGHTS)
def test_weights_golden(sigma: float) -> None:
    x = tensor(RATIOS).log()
    weight, pull, attached = tensor(WEIGHTS[sigma]).unbind(1)
    assert_close(omega(x, sigma=sigma), weight, **TIGHT)
    assert_close(factor(x, sigma=sigma), pull, **TIGHT)
    assert_close(-gipo_loss(x, torch.zeros_like(x), torch.ones_like(x), sigma=sigma), pull, **TIGHT)
    # Without the detached ω it would be the last column, which on policy alone is the same.
    assert_close(pull * (1 - x / sigma**2), attached, atol=2e-5, rtol=0)
    assert ((factor(x, sigma=sigma) - attached).abs()[x != 0] > 1e-3).all()


def test_narrow_and_limiting_weights_golden() -> None:
    x = tensor([0.8, 2.0]).log()
    assert_close(omega(x, sigma=0.2), tensor([0.536648, 0.002465]), **TIGHT)
    assert_close(factor(x, sigma=0.2), tensor([0.429318, 0.004930]), **TIGHT)
    for sigma, peak in ((0.2, 1.020201), (0.5, 1.133148), (1.0, 1.648721), (2.0, 7.389056)):
        assert float(factor(tensor([sigma**2]), sigma=sigma)) == pytest.approx(peak, abs=2e-6)
    assert float(omega(tensor([1.01]).log(), sigma=1e-3)) == pytest.approx(3.16556e-22, rel=1e-5)
    assert float(omega(tensor([4.0]).log(), sigma=1e3)) == pytest.approx(0.999999, abs=2e-6)
    kernels = {"gaussian": 0.606531, "laplace": 0.367879, "cauchy": 0.5}
    for kernel, value in kernels.items():
        assert float(omega(tensor([1.0]), kernel=kernel)) == pytest.approx(value, abs=2e-6)


# truncated inside ω alone; ρ too; not at all
@pytest.mark.parametrize(
    ("options", "expected"),
    [({"truncate": 5.0}, 1.503439e-03), ({"max_log_ratio": 5.0}, 5.530844e-04), ({}, 6.144212e-06)],
)
def test_truncation_golden(options: dict[str, Any], expected: float) -> None:
    loss = gipo_loss(tensor([6.0]), tensor([0.0]), tensor([1.0]), **options)
    assert float(-loss) == pytest.approx(expected, rel=1e-6)


# options → ω, losses, mean, gradient of the mean
BATCH_GOLDEN = [
    ({"sigma": 0.5}, [1, 0.606531, 0.606531, 0.135335], [-1, 1, -0.735759, 0.183940], -0.137955,
     [-0.25, 0.25, -0.183940, 0.045985]),
    ({"sigma": 1.0}, [1, 0.882497, 0.882497, 0.606531], [-1, 1.454991, -1.070523, 0.824361], 0.052207,
     [-0.25, 0.363748, -0.267631, 0.206090]),
    ({"sigma": 1.0, "negative_ratio": 0.5}, [1, 0.606531, 0.882497, 0.135335], [-1, 1, -1.070523, 0.183940], -0.221646,
     [-0.25, 0.25, -0.267631, 0.045985]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "weights", "losses", "mean", "slopes"), BATCH_GOLDEN)
def test_batch_golden(
    options: dict[str, Any], weights: list[float], losses: list[float], mean: float, slopes: list[float]
) -> None:
    x, advantages = tensor([[0, 0.5, -0.5, 1.0]]), tensor([[1, -1, 2, -0.5]])
    batch = Batch(x, torch.zeros_like(x), advantages, torch.ones_like(x).bool())
    got = gipo_loss(*batch.inputs, **options)
    share = token_weights(batch.mask, "token-mean")
    assert_close(gipo_log_omega(x, advantages, **options).exp(), tensor([weights]), **TIGHT)
    assert_close(got, tensor([losses]), **TIGHT)
    assert float((got * share).sum()) == pytest.approx(mean, abs=2e-6)
    assert_close(gradient(gipo_loss, batch, **options) * share, tensor([slopes]), **TIGHT)


def test_effective_sample_size_golden() -> None:
    x, advantages = tensor([[0, 0.5, -0.5, 1.0]]), tensor([[1, -1, 2, -0.5]])
    inputs = (x, torch.zeros_like(x), advantages)
    assert loss_statistics([loss_sums(gipo_loss, *inputs)])["effective"] == pytest.approx(0.878832, abs=2e-6)
    plain = partial(gipo_loss, sigma=math.inf)
    assert loss_statistics([loss_sums(plain, *inputs)])["effective"] == pytest.approx(0.777395, abs=2e-6)


# Properties. k(x) = ω ρ.


@settings(deadline=None)
@given(log_ratios, sigmas)
def test_1_the_update_is_bounded_and_largest_at_sigma_squared(x: float, sigma: float) -> None:
    bound = math.exp(sigma**2 / 2)
    assert float(factor(tensor([x]), sigma=sigma)) <= bound * (1 + 1e-12)
    assert float(factor(tensor([sigma**2]), sigma=sigma)) == pytest.approx(bound)


@settings(deadline=None)
@given(st.integers(-80, 80).map(lambda i: i / 16), st.sampled_from([0.2, 0.5, 1.0, 2.0]), st.sampled_from([-1.0, 1.0]))
def test_2_no_token_is_without_a_gradient(x: float, sigma: float, sign: float) -> None:
    inputs = (tensor([x]), tensor([0.0]), tensor([sign]))
    assert float(gradient_factors(partial(gipo_loss, sigma=sigma), *inputs)) > 0
    if abs(x) > 0.25 and x * sign > 0:
        assert float(gradient_factors(clipped_loss, *inputs)) == 0.0


def test_2_float32_rounds_a_distant_gradient_to_nothing() -> None:
    x = torch.tensor([-12.0, 16.0])  # x - x² / 2 is -84 and -112
    assert (factor(x) > 0).tolist() == [True, False]


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 2.0])
def test_3_distant_tokens_pull_ever_less_on_both_sides(sigma: float) -> None:
    for side in (1.0, -1.0):
        k = factor(side * tensor([5.0, 8.0, 12.0, 16.0, 19.0]), sigma=sigma).tolist()
        assert all(near > far or near == far == 0 for near, far in pairwise(k))
        assert k[-1] < 1e-8


@settings(deadline=None)
@given(log_ratios, sigmas, st.sampled_from(["gaussian", "laplace", "cauchy"]))
def test_4_omega_is_symmetric_in_the_log_at_most_1_and_grows_with_sigma(x: float, sigma: float, kernel: str) -> None:
    here, there = omega(tensor([x, -x]), sigma=sigma, kernel=kernel).tolist()
    wider = float(omega(tensor([x]), sigma=sigma * 1.5, kernel=kernel))
    assert here == there <= 1
    assert (here == 1) == (x == 0)
    assert wider > here or x == 0 or wider == here == 0


@settings(deadline=None)
@given(log_ratios, sigmas)
def test_5_the_gradient_factor_is_not_symmetric(x: float, sigma: float) -> None:
    here, there = factor(tensor([x, -x]), sigma=sigma).tolist()
    assert there == pytest.approx(here * math.exp(-2 * x), rel=1e-9)


@settings(deadline=None)
@given(st.lists(advantages_of, min_size=1, max_size=6), sigmas)
def test_6_on_policy_it_is_ppo_and_reinforce(values: list[float], sigma: float) -> None:
    advantages = tensor([values])
    batch = Batch(torch.full_like(advantages, -1), torch.full_like(advantages, -1), advantages, advantages > -99)
    assert_close(gipo_loss(*batch.inputs, sigma=sigma), -advantages)
    assert_close(gipo_loss(*batch.inputs, sigma=sigma), clipped_loss(*batch.inputs))
    assert_close(gradient(gipo_loss, batch, sigma=sigma), -advantages)
    assert_close(gradient(gipo_loss, batch, sigma=sigma), gradient(clipped_loss, batch))


@settings(deadline=None)
@given(log_ratios, advantages_of, st.sampled_from(["gaussian", "laplace", "cauchy"]))
def test_7_sigma_goes_from_nothing_to_plain_importance_sampling(x: float, advantage: float, kernel: str) -> None:
    inputs = (tensor([x]), tensor([0.0]), tensor([advantage]))
    for wide in (1e8, math.inf):
        assert float(gipo_loss(*inputs, sigma=wide, kernel=kernel)) == pytest.approx(-advantage * math.exp(x), rel=1e-6)
    if x:
        assert abs(float(gipo_loss(*inputs, sigma=2e-6, kernel=kernel))) < 1e-5


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 2.0])
def test_8_around_the_policy_it_is_importance_sampling_in_first_order(sigma: float) -> None:
    h = 1e-5
    above, below = factor(tensor([h, -h]), sigma=sigma).tolist()
    assert (above - below) / (2 * h) == pytest.approx(1.0, abs=1e-7)


@settings(deadline=None)
@given(log_ratios, sigmas, advantages_of)
def test_9_omega_is_detached(x: float, sigma: float, advantage: float) -> None:
    batch = Batch(tensor([x]), tensor([0.0]), tensor([advantage]), torch.tensor([True]))
    k = math.exp(x - x**2 / (2 * sigma**2))
    assert float(gradient(gipo_loss, batch, sigma=sigma)) == pytest.approx(-advantage * k, rel=1e-9, abs=1e-300)
    assert not gipo_log_omega(tensor([x]).requires_grad_(), tensor([1.0])).requires_grad


@settings(deadline=None)
@given(log_ratios, sigmas, advantages_of, st.integers(1, 40).map(lambda i: i / 8))
def test_10_it_is_linear_in_the_advantage_whose_sign_the_gradient_has(
    x: float, sigma: float, advantage: float, scale: float
) -> None:
    one, scaled = (
        Batch(tensor([x]), tensor([0.0]), tensor([a]), torch.tensor([True])) for a in (advantage, advantage * scale)
    )
    assert_close(gipo_loss(*scaled.inputs, sigma=sigma), gipo_loss(*one.inputs, sigma=sigma) * scale)
    slope = float(gradient(gipo_loss, one, sigma=sigma))
    assert slope * advantage < 0 or advantage == 0 or slope == 0
    if sigma >= 0.5:
        assert math.copysign(1, -slope) == math.copysign(1, advantage) or advantage == 0


@settings(deadline=None)
@given(st.lists(st.tuples(log_ratios, advantages_of, st.booleans()), min_size=1, max_size=8))
def test_11_masked_tokens_are_in_neither_sum_nor_count(tokens: list[tuple[float, float, bool]]) -> None:
    x, advantages = tensor([[x for x, _, _ in tokens]]), tensor([[a for _, a, _ in tokens]])
    mask = torch.tensor([[on for _, _, on in tokens]])
    masked = gipo_loss(x, torch.zeros_like(x), advantages, mask=mask) * token_weights(mask, "token-mean")
    kept = [a * math.exp(x - x * x / 2) for x, a, on in tokens if on]
    assert float(masked.sum()) == pytest.approx(-sum(kept) / max(len(kept), 1), rel=1e-9, abs=1e-12)


# Two actions, behaviour (.5, .5), learner (p, 1 - p), advantages (1, -1); the truth is 2p - 1. (bias, variance) each
TWO_ACTIONS = {
    0.6: [(-0.018659, 0.372905), (-0.000677, 0.852838), (-0.000054, 0.960938), (0, 1), (0, 1)],
    0.8: [(-0.549438, 0.002558), (-0.123006, 0.304268), (-0.015093, 0.718731), (0, 1), (-0.4, 1)],
    0.95: [(-0.894489, 0.000030), (-0.483242, 0.173689), (-0.130379, 0.603231), (0, 1), (-0.7, 1)],
}
ESTIMATORS: list[PolicyLoss] = [*(partial(gipo_loss, sigma=sigma) for sigma in (0.2, 0.5, 1.0, math.inf)), clipped_loss]


@pytest.mark.parametrize("p", TWO_ACTIONS)
def test_bias_and_variance_of_two_actions_golden(p: float) -> None:
    advantages = tensor([1.0, -1.0])
    for loss, (bias, variance) in zip(ESTIMATORS, TWO_ACTIONS[p], strict=True):
        estimate = -loss(tensor([p, 1 - p]).log(), tensor([0.5, 0.5]).log(), advantages)
        assert float(estimate.mean()) - (2 * p - 1) == pytest.approx(bias, abs=2e-6)
        assert float(estimate.var(correction=0)) == pytest.approx(variance, abs=2e-6)


# A 2 × 2 grid: states (0,0), (0,1), (1,0); the goal (1,1) gives 1; actions up, down, left, right.
AHEAD = [[0, 2, 0, 1], [1, 3, 0, 1], [0, 2, 2, 3]]
GOALWARD = tensor([[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]])


def grid(beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The learner's log-probabilities and advantages (3, 4), and its state values (3,); discount 0.9."""
    logprobs = (beta * GOALWARD).log_softmax(1)
    reward, after = (torch.tensor(AHEAD) == 3).double(), torch.nn.functional.one_hot(torch.tensor(AHEAD), 4).double()
    chances = logprobs.exp()
    moves = torch.einsum("sa,sax->sx", chances, after)[:, :3]
    values = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - 0.9 * moves, (chances * reward).sum(1))
    return logprobs, reward + 0.9 * after[..., :3] @ values - values[:, None], values


def spread(loss: PolicyLoss, beta: float) -> tuple[float, float, float, float]:
    """Of the estimated gradient under a uniform behaviour: norm of its bias, total variance, |g*|, cosine to g*."""
    logprobs, advantages, _ = grid(beta)
    behaviour = torch.full_like(logprobs, 0.25)
    factors = gradient_factors(loss, logprobs, behaviour.log(), advantages)
    score = torch.zeros(3, 4, 3, 4, dtype=torch.float64)  # of log π by the logits, for each state and action
    for s in range(3):
        score[s, :, s] = torch.eye(4) - logprobs[s].exp()
    pulls = (factors * advantages)[..., None, None] * score
    truth = ((logprobs.exp() * advantages)[..., None, None] * score).sum((0, 1)) / 3
    mean = pulls.mean((0, 1))
    variance = float(pulls.square().sum((2, 3)).mean() - mean.square().sum())
    cosine = float((mean * truth).sum() / (mean.norm() * truth.norm()).clamp(min=1e-300))
    return float((mean - truth).norm()), variance, float(truth.norm()), cosine


GRID: list[tuple[PolicyLoss, Sequence[tuple[float, float]]]] = [
    (partial(gipo_loss, sigma=math.inf), [(0, 0.011911), (0, 0.007114), (0, 0.001895)]),
    (clipped_loss, [(0.027404, 0.004598), (0.035867, 0), (0.020508, 0)]),
    (partial(sapo_loss, tau_negative=2.0), [(0.001439, 0.011113), (0.004778, 0.005385), (0.007475, 0.000855)]),
    (partial(gipo_loss, sigma=0.2), [(0.024505, 0.002965), (0.032238, 0.000156), (0.020506, 0.000000)]),
    (partial(gipo_loss, sigma=0.5), [(0.006390, 0.008675), (0.014315, 0.002848), (0.017515, 0.000053)]),
    (partial(gipo_loss, sigma=1.0), [(0.001733, 0.010962), (0.004526, 0.005490), (0.007958, 0.000734)]),
    (partial(gipo_loss, sigma=2.0), [(0.000442, 0.011663), (0.001206, 0.006654), (0.002391, 0.001489)]),
]


@pytest.mark.parametrize(("loss", "expected"), GRID)
def test_bias_and_variance_of_the_grid_golden(loss: PolicyLoss, expected: Sequence[tuple[float, float]]) -> None:
    truths = (0.042226, 0.035867, 0.020508)
    for beta, truth, (bias, variance) in zip((0.5, 1.0, 2.0), truths, expected, strict=True):
        assert spread(loss, beta)[:3] == pytest.approx((bias, variance, truth), abs=2e-6)


def test_the_grid_itself_golden() -> None:
    logprobs, advantages, values = grid(1.0)
    assert_close(values, tensor([0.752193, 0.866516, 0.866516]), **TIGHT)
    assert_close(advantages[0], tensor([-0.075219, 0.027672, -0.075219, 0.027672]), **TIGHT)
    assert_close(logprobs[0].exp(), tensor([0.134471, 0.365529, 0.134471, 0.365529]), **TIGHT)
    ratio = logprobs.exp() * 4
    assert (float(ratio.min()), float(ratio.max())) == pytest.approx((0.537883, 1.901468), abs=2e-6)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_stale_samples_leave_ppo_without_a_gradient_but_not_gipo(beta: float) -> None:
    logprobs, advantages, _ = grid(beta)
    behaviour = torch.full_like(logprobs, 0.25).log()
    assert loss_statistics([loss_sums(clipped_loss, logprobs, behaviour, advantages)])["cut"] == 1.0
    for sigma in (0.5, 1.0, 2.0):
        assert spread(partial(gipo_loss, sigma=sigma), beta)[3] > 0.99


def test_an_advantage_of_zero_counts_as_negative() -> None:
    weights = gipo_log_omega(tensor([1.0, 1.0, 1.0]), tensor([1.0, 0.0, -1.0]), negative_ratio=0.5)
    assert weights.tolist() == [-0.5, -2.0, -2.0]
