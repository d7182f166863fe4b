"""Liger's kernels: refused where they cannot run, and on a GPU the same values and gradients."""

from __future__ import annotations

from copy import deepcopy
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from agentgym_ig.trainers import TokenBatch
from agentgym_ig.trainers.liger import with_liger
from agentgym_ig.trainers.packing import packing
from tests.test_packing import batch_of, read
from tests.tiny import untrained

THERE = find_spec("liger_kernel") is not None
ON_GPU = SimpleNamespace(device=torch.device("cuda"), config=SimpleNamespace(model_type="bloom"))


def test_a_model_on_a_cpu_is_refused_unchanged() -> None:
    model = untrained("llama")
    with pytest.raises(ValueError, match="on a GPU, and the model is on cpu; leave out --liger"):
        with_liger(model)
    assert "forward" not in vars(model.model.norm)


@pytest.mark.skipif(THERE, reason="the package is there")
def test_without_the_package_it_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"pip install 'agentgym_ig\[liger\]'"):
        with_liger(ON_GPU)


@pytest.mark.skipif(not THERE, reason="needs liger-kernel")
def test_a_family_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no kernels for a bloom; .* llama"):
        with_liger(ON_GPU)


@pytest.mark.skipif(not THERE or not torch.cuda.is_available(), reason="needs liger-kernel and a GPU")
def test_values_and_gradients_are_the_same() -> None:
    model, batch = deepcopy(untrained("llama")).cuda(), batch_of()
    batch = TokenBatch(batch.ids.cuda(), batch.real.cuda(), batch.turn.cuda())
    with packing(model):
        wanted = read(model, batch)
        found = read(with_liger(model), batch)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() < 1e-3 * other.norm()
