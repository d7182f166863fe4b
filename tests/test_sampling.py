"""One token from each row of logits, against the plainly right way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentgym_ig.lm.sampling import choose

SIZES = [1, 2, 377, 4096, 4097, 5120, 5121, 20_011]
"""Vocabularies below, at and above what is gone through in one piece, and with and without a last block."""


def plain(logits: torch.Tensor, temperature: float, draws: torch.Tensor) -> list[int]:
    """A token at a time, in float64."""
    tokens = []
    for row, draw in zip(logits.double() / temperature, draws.tolist(), strict=True):
        upto = row.softmax(-1).cumsum(-1).numpy()
        tokens.append(int(np.searchsorted(upto, draw * upto[-1], side="right")))
    return tokens


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_token_is_the_one_that_the_draw_falls_on(size: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(40, size, generator=generator)
    draws = torch.rand(40, generator=generator, dtype=torch.float64)
    tokens, logprobs = choose(logits, temperature, draws)
    assert tokens.tolist() == plain(logits, temperature, draws)
    wanted = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, wanted, atol=2e-6, rtol=0)
    greedy, likely = choose(logits, 0.0, draws)
    assert torch.equal(greedy, logits.argmax(-1))
    torch.testing.assert_close(likely, logits.log_softmax(-1).amax(-1), atol=2e-6, rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SIZES),
    st.sampled_from([0.0, 1e-300, 0.25, 0.5, 1 - 2**-53]),
    st.lists(st.integers(0, 20_010), min_size=1, max_size=3),
)
def test_a_token_of_no_probability_is_never_drawn(size: int, draw: float, places: list[int]) -> None:
    logits = torch.full((1, size), -torch.inf)
    possible = sorted({place % size for place in places})
    logits[0, possible] = 0.0
    tokens, logprobs = choose(logits, 1.0, torch.tensor([draw], dtype=torch.float64))
    assert int(tokens[0]) == possible[min(int(draw * len(possible)), len(possible) - 1)]
    assert float(logprobs[0]) == pytest.approx(-np.log(len(possible)), abs=1e-6)


def test_every_token_is_drawn_as_often_as_it_is_probable() -> None:
    logits = torch.randn(1, 6000, generator=torch.Generator().manual_seed(0)).mul(4).expand(2000, -1)
    # Draws that are evenly spread: each token's count is its probability, to one draw at either end.
    draws = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    counts = torch.bincount(choose(logits, 1.0, draws)[0], minlength=6000)
    assert ((counts - 2000 * logits[0].double().softmax(-1)).abs() < 1 + 1e-6).all()
