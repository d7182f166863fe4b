"""Fine-tuning on episodes: it teaches, the agent's tokens alone, and neither cuts nor stops nor restarts matter."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, get_scheduler

from agentgym_ig import CheckpointError, Stop
from agentgym_ig.answers import score
from agentgym_ig.envs import SearchVectorEnv, Start, rollout, tinywiki_index, tinywiki_questions
from agentgym_ig.envs.gold import gold_passages
from agentgym_ig.envs.rollout import prompts_of
from agentgym_ig.envs.tinywiki import TINYWIKI_RULES
from agentgym_ig.indexes import StoredIndex
from agentgym_ig.lm.encode import OBSERVED, Encoded
from agentgym_ig.policies import QuestionPolicy, oracle
from agentgym_ig.records import METRICS_FILE, write_episodes
from agentgym_ig.tinywiki import World
from agentgym_ig.trainers.adapters import is_adapted, with_lora
from agentgym_ig.trainers.checkpoint import checkpoints
from agentgym_ig.trainers.learner import Learner, make_learner
from agentgym_ig.trainers.sft import SftConfig, chosen, encode_all, learn, retokenised, rows_of, sft
from agentgym_ig.trainers.tinywiki import WARM_START, load_policy_model, tiny_policy
from agentgym_ig.trainers.warm_start import Demonstrator, WarmStartConfig
from agentgym_ig.types import Action, Trajectory
from tests.conftest import Command
from tests.tiny import play, tiny_env

CONFIG = SftConfig(epochs=2, batch_size=6, learning_rate=1e-3, save_every=1)
RIGHT = WarmStartConfig(right=1.0, first=0.0, again=0.0, answer=1.0, wrong_answer=0.0)


def small() -> tuple[Any, Any]:
    return load_policy_model(WARM_START)


@cache
def by_oracle() -> tuple[Trajectory, ...]:
    """Text alone, without token ids; every query is a whole article."""
    env = tiny_env()
    assert isinstance(env.index, StoredIndex)
    gold = gold_passages(env.index, env.questions.values())
    return tuple(rollout(env, oracle(prompts_of(env), gold), list(env.questions)[:16]))


def asked(world: World, count: int) -> tuple[SearchVectorEnv, QuestionPolicy]:
    """Two-hop questions over a world, and a policy that always follows the right link."""
    paths = tinywiki_questions(world, "hop2", count)
    env = SearchVectorEnv(tinywiki_index(world), list(paths), count, TINYWIKI_RULES)
    act = Demonstrator(RIGHT, world, {question.id: path for question, path in paths.items()})
    return env, QuestionPolicy(prompts_of(env), act)


def log(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / METRICS_FILE).read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def same_run(one: Path, other: Path) -> None:
    assert log(one) == log(other)
    weights = [path / "model" / "model.safetensors" for path in (one, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    states = [checkpoints(path / "checkpoints")[-1] / "optimizer.safetensors" for path in (one, other)]
    assert states[0].read_bytes() == states[1].read_bytes()


def slow_nats(model: Any, encoded: Sequence[Encoded]) -> torch.Tensor:
    """-log p of all tokens of the agent, added up: one episode and one token at a time."""
    total = torch.zeros(())
    for own in encoded:
        logprobs = model(input_ids=torch.tensor([own.ids])).logits[0].log_softmax(-1)
        for place, (token, turn) in enumerate(zip(own.ids, own.turn, strict=True)):
            if turn != OBSERVED:
                total = total - logprobs[place - 1, token]
    return total


def count_tokens(encoded: Sequence[Encoded]) -> int:
    return sum(turn != OBSERVED for own in encoded for turn in own.turn)


def descending(model: Any, tokenizer: Any) -> Learner:
    """A learner with plain gradient descent of rate 1, so that a step shows its gradient."""
    learner = make_learner(model, tokenizer, CONFIG.as_train(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return replace(learner, optimizer=optimizer, schedule=get_scheduler("constant", optimizer))


def gradient(encoded: Sequence[Encoded], **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What a step on the shipped model takes off its weights, and the step's figures."""
    model, tokenizer = small()
    before = {name: own.detach().clone() for name, own in model.named_parameters()}
    config = replace(CONFIG, max_grad_norm=1e9, **changes).as_train(len(encoded))
    figures = learn(descending(model, tokenizer), encoded, config)
    return {name: before[name] - own.detach() for name, own in model.named_parameters()}, figures


def test_a_fine_tuned_policy_answers_new_questions_and_finds_its_teacher_likely(tmp_path: Path) -> None:
    env, teacher = asked(World(5, "train"), 160)
    episodes = rollout(env, teacher, list(env.questions))
    model, tokenizer = small()
    new, _ = asked(World(6, "train"), 60)

    def measured() -> tuple[float, float]:
        starts = [Start(question, 0, number) for number, question in enumerate(new.questions)]
        played = rollout(new, tiny_policy(model, tokenizer), starts)
        em = np.mean([score("em", own.answer, own.question.answers) for own in played])
        encoded = encode_all(model, tokenizer, episodes)[:20]
        with torch.no_grad():
            return float(em), float(slow_nats(model, encoded)) / count_tokens(encoded)

    em, nats = measured()
    folder = sft(model, tokenizer, chosen(episodes), replace(CONFIG, epochs=3, batch_size=16, save_every=99), tmp_path)
    taught_em, taught_nats = measured()
    assert taught_em > max(0.6, em + 0.4)
    assert taught_nats < nats / 10
    rows = log(tmp_path)
    assert len(rows) == 30
    assert [rows[9]["epoch"], rows[-1]["epoch"], rows[-1]["step"]] == [1.0, 3.0, 30]
    assert sum(row["episodes"] for row in rows[:10]) == 160
    saved = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], own) for name, own in model.state_dict().items())


def test_the_loss_and_its_gradient_are_those_of_a_slow_loop_over_the_agents_tokens() -> None:
    model, tokenizer = small()
    encoded = encode_all(model, tokenizer, [*by_oracle()[:4], *play(4)])
    loss = slow_nats(model, encoded) / count_tokens(encoded)
    loss.backward()
    found, figures = gradient(encoded)
    for name, own in model.named_parameters():
        assert_close(found[name], own.grad, atol=2e-6, rtol=1e-3)
    assert figures["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert figures["tokens"] == count_tokens(encoded)
    norm = torch.stack([own.grad.norm() for own in model.parameters()]).norm()
    assert figures["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_what_comes_after_the_agents_last_token_has_no_gradient() -> None:
    model, tokenizer = small()
    whole = encode_all(model, tokenizer, by_oracle()[:3])
    longer = [Encoded([*own.ids, *range(300, 340)], [*own.turn, *[OBSERVED] * 40], own.decisions) for own in whole]
    (one, _), (other, _) = gradient(whole), gradient(longer)
    for name, own in one.items():
        assert_close(other[name], own, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_change_nothing(size: int) -> None:
    encoded = encode_all(*small(), [*by_oracle()[:8], *play(8)])
    (whole, figures), (cut, cut_figures) = gradient(encoded, micro_batch=64), gradient(encoded, micro_batch=size)
    for name, own in whole.items():
        assert_close(cut[name], own, atol=2e-6, rtol=0)
    assert cut_figures == pytest.approx(figures, rel=1e-4)


def test_recorded_ids_are_learned_as_they_are_and_text_is_tokenised() -> None:
    model, tokenizer = small()
    played = play(1)[0]
    first = played.turns[0].action
    byte_by_byte = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in first.text.encode()]
    cut = replace(played, turns=played.turns[:1])
    spelt = replace(played, turns=(replace(played.turns[0], action=Action(first.text, tuple(byte_by_byte))),))
    for episode, ids in ((spelt, byte_by_byte), (played, list(first.token_ids))):
        own = encode_all(model, tokenizer, [episode])[0]
        assert [token for token, turn in zip(own.ids, own.turn, strict=True) if turn == 0] == ids
    plain = by_oracle()[0]
    assert not any(turn.action.token_ids for turn in plain.turns)
    own = encode_all(model, tokenizer, [plain])[0]
    for number, turn in enumerate(plain.turns):
        written = [token for token, place in zip(own.ids, own.turn, strict=True) if place == number]
        assert written == tokenizer(turn.action.text, add_special_tokens=False)["input_ids"]
    assert not any(turn.action.token_ids for turn in retokenised([spelt])[0].turns)
    assert encode_all(model, tokenizer, retokenised([spelt])) == encode_all(model, tokenizer, retokenised([cut]))


def test_ids_of_another_tokenizer_are_refused() -> None:
    model, tokenizer = small()
    played = play(1)[0]
    action = played.turns[0].action
    for ids in ([own + 7 for own in action.token_ids], [10**6] * 3):
        shifted = replace(played.turns[0], action=replace(action, token_ids=tuple(ids)))
        with pytest.raises(ValueError, match="--as-text"):
            encode_all(model, tokenizer, [replace(played, turns=(shifted, *played.turns[1:]))])


def test_recorded_episodes_of_every_kind_pass_the_check_of_their_ids() -> None:
    assert len(encode_all(*small(), play(16))) == 16
    hot = tiny_policy(*small())
    hot.temperature = 30.0  # nearly any token, bytes that are no text among them
    assert len(encode_all(*small(), play(16, hot))) == 16


def test_only_right_episodes_are_chosen() -> None:
    right, wrong = by_oracle()[0], replace(by_oracle()[1], answer="nothing at all")
    half = replace(wrong, answer=" ".join([*wrong.question.answers[0].split(), "indeed", "so", "it", "is"]))
    silent = replace(wrong, answer=None)
    failed = replace(right, stop=Stop.SEARCH_FAILED)
    every = [right, wrong, half, silent, failed]
    assert chosen(every) == [right]
    assert chosen(every, metric="f1", least=0.4) == [right, half]
    assert chosen(every, least=0) == [right, wrong, half, silent]
    with pytest.raises(ValueError, match="of 4 episodes 1 failed, and no other has em of 1"):
        chosen(every[1:])
    misused: list[dict[str, Any]] = [{"metric": "rouge"}, {"least": 1.5}, {"least": float("nan")}]
    for wrong_use in misused:
        with pytest.raises(ValueError, match="must be one of"):
            chosen(every, **wrong_use)


def test_longer_conversations_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = small()
    quiet = replace(by_oracle()[0], turns=(replace(by_oracle()[0].turns[0], action=Action("")),))
    lengths = sorted(len(own.ids) for own in encode_all(model, tokenizer, by_oracle()))
    kept = encode_all(model, tokenizer, [*by_oracle(), quiet], lengths[9])
    assert sorted(len(own.ids) for own in kept) == [length for length in lengths if length <= lengths[9]]
    more = 16 - len(kept)
    assert f"of 17 conversations {more} have more than max_tokens={lengths[9]} tokens, and in 1" in caplog.text
    with pytest.raises(ValueError, match="nothing to learn from: of 16 conversations 16"):
        encode_all(model, tokenizer, by_oracle(), 3)
    model.config.max_position_embeddings = limit = lengths[-1] - 1
    with pytest.raises(ValueError, match=f"leave them out by max_tokens={limit}"):
        encode_all(model, tokenizer, by_oracle())
    assert len(encode_all(model, tokenizer, by_oracle(), limit)) == sum(length <= limit for length in lengths)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "micro_batch", "learning_rate", "max_tokens", "keep"])
def test_settings_are_checked_at_birth(name: str) -> None:
    wrong: list[dict[str, Any]] = [{name: 0}, {"warmup": 1.5}, {"schedule": "step"}, {"seed": -1}]
    for changes in wrong:
        with pytest.raises(ValueError, match=next(iter(changes))):
            SftConfig(**changes)


def test_each_epoch_has_every_episode_once_in_an_order_of_its_own() -> None:
    config = SftConfig(batch_size=4, seed=3)
    epochs = [[rows_of(3 * epoch + part, 10, config) for part in range(3)] for epoch in range(3)]
    assert [[len(part) for part in epoch] for epoch in epochs] == [[4, 3, 3]] * 3
    assert all(sorted(row for part in epoch for row in part) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows_of(4, 10, config) == epochs[1][1]
    assert rows_of(4, 10, replace(config, seed=4)) != epochs[1][1]


@pytest.mark.parametrize("adapt", [lambda model: model, lambda model: with_lora(model, rank=4)], ids=["whole", "lora"])
def test_interrupted_and_resumed_equals_never_stopped(adapt: Callable[[Any], Any], tmp_path: Path) -> None:
    def run(out: str, resume: bool = False, stop_at: int = 0, **changes: Any) -> Any:
        model, tokenizer = small()
        model = adapt(model)

        def progress(done: int, metrics: dict[str, Any]) -> None:
            if done == stop_at:
                os.kill(os.getpid(), signal.SIGINT)

        config = replace(CONFIG, save_every=4, **changes)
        sft(model, tokenizer, by_oracle(), config, tmp_path / out, resume=resume, progress=progress)
        return model

    begun = adapt(small()[0]).state_dict()
    model = run("whole")
    trained = [name for name, own in model.state_dict().items() if not torch.equal(own, begun[name])]
    assert trained
    assert all("lora" in name for name in trained) == is_adapted(model)
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop_at=3)
    assert [own.name for own in checkpoints(tmp_path / "parts" / "checkpoints")] == ["step-000003"]
    run("parts", resume=True, keep=5)
    same_run(tmp_path / "parts", tmp_path / "whole")
    run("parts", resume=True)  # nothing is left to do
    same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_bfloat16_and_checkpointed_activations_change_little(tmp_path: Path) -> None:
    for name in ("plain", "lean"):
        model, tokenizer = small()
        config = replace(CONFIG, bf16=name == "lean", gradient_checkpointing=name == "lean")
        sft(with_lora(model, rank=8), tokenizer, by_oracle(), config, tmp_path / name)
    losses = [[row["loss"] for row in log(tmp_path / name)] for name in ("plain", "lean")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]


def test_steps_that_are_not_finite_are_skipped_until_there_are_too_many(tmp_path: Path) -> None:
    model, tokenizer = small()
    config = replace(CONFIG, epochs=6, warmup=0.0, learning_rate=1e35, max_skipped_updates=3)
    with pytest.raises(FloatingPointError, match="4 updates were skipped"):
        sft(model, tokenizer, by_oracle(), config, tmp_path)
    rows = log(tmp_path)
    assert [row["skipped_updates"] for row in rows[-4:]] == [1] * 4
    assert "loss" in rows[0]
    assert not any("loss" in row for row in rows[-4:])
    with pytest.raises(FloatingPointError):
        sft(*small(), by_oracle(), replace(config, max_skipped_updates=4), tmp_path, resume=True)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    def run(episodes: Sequence[Trajectory] = by_oracle(), resume: bool = True, **changes: Any) -> None:
        model, tokenizer = small()
        sft(model, tokenizer, episodes, replace(CONFIG, epochs=1, **changes), tmp_path, resume=resume)

    with pytest.raises(FileNotFoundError, match="without --resume"):
        run()
    run(resume=False)
    with pytest.raises(FileExistsError, match="add --resume"):
        run(resume=False)
    with pytest.raises(CheckpointError, match="data="):
        run(by_oracle()[::-1])
    with pytest.raises(CheckpointError, match=r"learning_rate=0.001 \(now 0.1\)"):
        run(learning_rate=0.1)
    with pytest.raises(ValueError, match="nothing to learn from"):
        run([])
    lines = (tmp_path / METRICS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / METRICS_FILE).write_text(lines[0])
    with pytest.raises(CheckpointError, match="has 1 lines and step-000003 is of step 3"):
        run()


def test_the_command_from_recording_to_evaluation(command: Command, tmp_path: Path) -> None:
    file, out = tmp_path / "played" / "episodes.jsonl", tmp_path / "run"
    code, printed = command("eval", "--policy", "oracle", "--limit", 2, "--out", tmp_path / "played")
    assert code == 0, printed
    tune = ("sft", "--episodes", file, "--out", out, "--epochs", 1, "--batch-size", 5)
    code, printed = command(*tune, "--micro-batch", 2, "--lora-rank", 4, "--bf16")
    assert code == 0, printed
    assert "8 of 8 episodes have em of 1 or more" in printed
    assert f"agentgym-ig train --model {out / 'model'} --suite tinywiki" in printed
    assert len(log(out)) == 2
    assert command("eval", "--model", out / "model", "--limit", 1)[0] == 0
    code, printed = command(*tune)
    assert code == 1
    assert "add --resume to go on with it" in printed


def test_the_command_refuses_files_without_anything_to_learn_from(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "other").write_text('{"title": "Metropolis"}\n')
    write_episodes(tmp_path / "wrong", [replace(own, answer="never") for own in by_oracle()])
    found = {
        "empty": "no episodes to learn from",
        "other": "other:1 is no episode",
        "wrong": "no other has em of 1.0 or more",
    }
    for name, said in found.items():
        code, printed = command("sft", "--episodes", tmp_path / name, "--out", tmp_path / "run")
        assert code == 1
        assert said in printed
        assert not (tmp_path / "run").exists()
    assert command("sft", "--episodes", tmp_path / "absent", "--out", tmp_path / "run")[0] == 2


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(tmp_path: Path) -> None:
    write_episodes(tmp_path / "episodes.jsonl", [*by_oracle(), *play(16)])
    command = [sys.executable, "-m", "agentgym_ig", "sft", "--episodes", str(tmp_path / "episodes.jsonl")]
    command += ["--min-score", "0", "--epochs", "6", "--batch-size", "8", "--save-every", "1", "--out"]

    def started(name: str, *more: str) -> subprocess.Popen[str]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*command, str(tmp_path / name), *more], stdout=pipe, stderr=subprocess.STDOUT, text=True, env=environment
        )

    alone = started("alone")
    assert alone.communicate(timeout=300)[0].count("fine-tuned model") == 1
    assert len(log(tmp_path / "alone")) == 24
    for kill in range(2):
        process = started("killed", *(["--resume"] if kill else []))
        before = (tmp_path / "killed" / METRICS_FILE).stat().st_mtime_ns if kill else 0
        deadline = time.monotonic() + 120
        while not (file := tmp_path / "killed" / METRICS_FILE).exists() or file.stat().st_mtime_ns == before:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.random())
        process.kill()
        process.communicate(timeout=60)
    last = started("killed", "--resume")
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    same_run(tmp_path / "killed", tmp_path / "alone")
