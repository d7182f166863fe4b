"""The benchmark for a GPU, on the CPU with tiny models: all of its code, and what it makes of parts that cannot run."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from agentgym_ig.lm.encode import Encoded
from agentgym_ig.trainers.footprint import Sketch, counts
from benchmarks import gpu, gpu_parts
from benchmarks.gpu_parts import FULL, MODELS, SMALL


def figures_of(tmp_path: Path, *parts: str, minutes: float = 8.0) -> dict[str, Any]:
    out = tmp_path / "gpu.json"
    gpu.main(out, "cpu", True, minutes, 1, 1, list(parts))
    written: dict[str, Any] = json.loads(out.read_text())
    return written


@pytest.mark.parametrize("name", ["0.5B", "7B"])
def test_a_step(name: str, tmp_path: Path) -> None:
    found = figures_of(tmp_path, f"step {name}")[f"step {name}"]
    assert (found["trained"] < found["parameters"]) == (name == "7B")
    assert found["sampled_tokens"] == SMALL.episodes * SMALL.turns * SMALL.new
    assert found["tokens"] == SMALL.episodes * SMALL.context
    assert found["grad_norm"] > 0
    assert found["mfu"] is None, "a CPU is no share of a GPU"
    assert all(own["planned"] > 0 and own["measured"] is None for own in found["memory_gb"].values())
    assert found["bf16_error_nats"]["tokens"] == SMALL.exact * SMALL.turns * SMALL.new
    assert 0 < found["bf16_error_nats"]["mean"] <= found["bf16_error_nats"]["max"] < 0.1
    assert found["information_gain"]["of_the_step"] <= abs(found["information_gain"]["of_scoring_and_update"])


def test_the_other_parts(tmp_path: Path) -> None:
    found = figures_of(tmp_path, "rollout 0.5B", "kernels", "learning", "info_gain", "flat_search")
    assert found["kernels"]["sdpa"]["update_tokens_per_s"] > 0
    assert "GPU" in found["kernels"]["liger"]["why_not"] or "[liger]" in found["kernels"]["liger"]["why_not"]
    assert all(found["kernels"][name] for name in gpu_parts.KERNELS)
    for engine in ("engine", "rollout", "continuous"):
        assert found["rollout 0.5B"][f"{engine}_tokens_per_s"] > 0
    assert found["learning"]["steps"] == SMALL.learning_steps
    assert 0 <= found["learning"]["after"]["id_em"] <= 1
    assert found["info_gain"]["cases"][0]["largest_difference"] < 1e-4
    assert found["flat_search"]["torch, batches of 64"]["queries_per_s"] > 0


def test_flops_of_an_update() -> None:
    config = gpu_parts.config_of("7B", SMALL)  # 2 layers 32 wide, 4 heads of 8 and 4 for keys, 64 within, 1,000 words
    layer = 4 * 32 * 32 + 3 * 32 * 64
    norms_and_biases = 2 * (2 * 32 + 3 * 32) + 32  # counted as parameters, as N is
    tokens, sampled = 100, 10
    encoded = [Encoded([1] * tokens, [-1] * (tokens - sampled) + [0] * sampled, [])]
    found = gpu_parts.model_flops(counts(Sketch(config.to_json_string(use_diff=False))), encoded)
    attention = 3 * 2 * (2 * 32 * tokens**2)  # two products of half a square each, once forward and twice backward
    assert found == 6 * (2 * layer + norms_and_biases) * tokens + 6 * 1000 * 32 * sampled + attention


@pytest.mark.parametrize(("name", "billions"), list(zip(MODELS, (0.494, 1.544, 7.616), strict=True)))
def test_shapes_are_those_of_qwen(name: str, billions: float) -> None:
    own = counts(Sketch(gpu_parts.config_of(name, FULL).to_json_string(use_diff=False)))
    assert own.parameters / 1e9 == pytest.approx(billions, abs=1e-3)


def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SMALL_VECTORS", (0, 32))  # nothing to search
    with pytest.raises(typer.Exit):
        figures_of(tmp_path, "flat_search", "learning")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["flat_search"]["error"]
    assert found["learning"]["steps"] == SMALL.learning_steps


def test_what_no_longer_fits_is_skipped(tmp_path: Path) -> None:
    found = figures_of(tmp_path, "learning", minutes=0)
    assert found["learning"].keys() == {"skipped"}


def test_parts_and_devices_that_are_not_there() -> None:
    with pytest.raises(typer.BadParameter, match=r"unknown nothing; choose some of step 1\.5B"):
        gpu.main(None, "cpu", True, 8.0, 1, 1, ["nothing"])
