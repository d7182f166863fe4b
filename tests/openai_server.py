"""Servers for the tests, each in a process of its own, around a real small model.

`transformers serve` is the real thing. It takes no token ids and gives no log-probabilities, and no server that does
can be installed on every machine that runs these tests. So this module is one as well: what vLLM does with `echo`,
`logprobs`, `return_token_ids` and `stop_reason`, done by a transformers model; and it fails on demand.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agentgym_ig.lm.arguments import with_cache
from agentgym_ig.remote import OpenAIPolicy, OpenAIServer
from agentgym_ig.types import Action, Conversation, Message
from tests.test_server import free_port

ROOT = Path(__file__).parent.parent
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Chat = list[dict[str, str]]

QUESTION = "Which city is the capital of Poland?"
FOUND = "Warsaw is the capital of Poland."
INFORMATION = f"<information>{FOUND}</information>"
SEARCH = "<think>I look it up.</think>\n<search>capital of Poland</search>"
CALL = (
    '<think>I look it up.</think>\n<tool_call>\n{"name": "search", "arguments": {"query": ["capital"]}}\n</tool_call>'
)
ANSWER = "<answer>Warsaw</answer>"
TOOLS = "Use the tool."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


LESSONS: list[tuple[Chat | str, str]] = [
    ([user(QUESTION)], SEARCH),
    ([user(QUESTION), assistant(SEARCH), user(INFORMATION)], ANSWER),
    ([{"role": "system", "content": TOOLS}, user(QUESTION)], CALL),
    (
        [
            {"role": "system", "content": TOOLS},
            user(QUESTION),
            assistant(CALL),
            user(f"<tool_response>\n{FOUND}\n</tool_response>"),
        ],
        ANSWER,
    ),
    (QUESTION, SEARCH),
    (QUESTION + SEARCH + INFORMATION, ANSWER),
    ([user("End early.")], "<search>Warsaw"),
]
TAGS = Conversation((Message("user", QUESTION),), seed=3)
CALLS = Conversation((Message("system", TOOLS), Message("user", QUESTION)), seed=3, grammar="tools")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and those of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left")
    fast.add_tokens([AddedToken("<|im_start|>", normalized=False, special=True)])
    fast.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    fast.chat_template = CHATML
    return fast


def rendered(tokenizer: Any, chat: Chat) -> str:
    """The chat as the model's template shows it, up to where the model is to go on."""
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def teach(folder: Path, lessons: Sequence[tuple[Chat | str, str]] = LESSONS) -> None:
    """Save a model that answers each chat, or continues each text, as it was taught, if nothing is left to chance."""
    tokenizer = byte_tokenizer()
    rows, targets = [], []
    for prompt, answer in lessons:
        before = tokenizer(prompt if isinstance(prompt, str) else rendered(tokenizer, prompt))["input_ids"]
        after = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        rows.append(before + after)
        targets.append([-100] * len(before) + after)
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    wanted = torch.tensor([row + [-100] * (width - len(row)) for row in targets])
    size: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "dtype": "float32",
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**size))
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(300):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss < 0.01:
                break
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def running(command: Sequence[str], url: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that answers; whatever happens, it does not outlive the block."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=offline) as process:
        try:
            deadline = time.monotonic() + 120
            while not _answers(url):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def transformers_serve(log: Path) -> Iterator[str]:
    """The real one. It serves whatever model folder a request names."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with running(command, url, log):
        yield url


@contextmanager
def own_server(folder: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The server below, with the model of a folder, known by the folder's name and as `small`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tests.openai_server", str(folder), "--port", str(port)]
    with running(command, url, log) as process:
        yield url, process


def plan(url: str, *faults: dict[str, Any]) -> None:
    """What the server below is to do wrong from now on; it forgets what it has seen."""
    httpx.post(f"{url}/faults", json=faults)


def seen(url: str) -> list[dict[str, Any]]:
    """The requests since the last plan."""
    requests: list[dict[str, Any]] = httpx.get(f"{url}/seen").json()
    return requests


def client(url: str, model: str = "small", **options: Any) -> OpenAIServer:
    return OpenAIServer(url, model, **{"pause": 0.01, "timeout": 60.0, **options})


def reply(text: str | None, **fields: Any) -> dict[str, Any]:
    """A fault that is none: an answer from a script."""
    message = {"role": "assistant", "content": text, **fields.pop("message", {})}
    return {"status": 200, "body": {"choices": [{"message": message, "finish_reason": "stop", **fields}]}}


def one(policy: OpenAIPolicy, conversation: Conversation = TAGS) -> Action:
    (action,) = policy([conversation])
    assert action is not None
    return action


class Faults:
    """What is to go wrong next. Each fault is `{"status", "body", "headers", "delay", "when", "times"}`, and hits the
    first `times` requests whose body holds the text `when`.
    """

    def __init__(self) -> None:
        self.planned: list[dict[str, Any]] = []

    async def hit(self, body: str) -> Response | None:
        """The fault in place of an answer; None where all goes well, perhaps late."""
        for fault in self.planned:
            if fault.get("times", 1) > 0 and fault.get("when", "") in body:
                fault["times"] = fault.get("times", 1) - 1
                await asyncio.sleep(fault.get("delay", 0))
                if "status" not in fault:
                    return None
                said = fault.get("body", "")
                content = said if isinstance(said, str) else json.dumps(said)
                return Response(content, fault["status"], fault.get("headers"))
        return None


class Small:
    """Writes with a transformers model: greedily at temperature 0, else with the request's seed."""

    def __init__(self, folder: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        return torch.log_softmax(self.model(input_ids=torch.tensor([ids])).logits[0].float(), -1)

    @torch.no_grad()
    def write(self, ids: list[int], asked: dict[str, Any]) -> dict[str, Any]:
        """The text without its stop string, why it ended, and the tokens with their log-probabilities."""
        temperature, stops = asked.get("temperature", 1.0), asked.get("stop") or []
        random = torch.Generator().manual_seed(asked.get("seed", 0))
        written: list[int] = []
        logprobs: list[float] = []
        text, reason, stop = "", "length", None
        cache = with_cache(self.model, DynamicCache(config=self.model.config))
        while len(written) < asked["max_tokens"]:
            out = self.model(input_ids=torch.tensor([written[-1:] or ids]), **cache)
            last = torch.log_softmax(out.logits[0, -1].float(), -1)
            probable = torch.softmax(last / (temperature or 1), -1)
            token = int(torch.multinomial(probable, 1, generator=random) if temperature else last.argmax())
            written.append(token)
            logprobs.append(float(last[token]))
            if token == self.tokenizer.eos_token_id:
                reason = "stop"
                break
            text = self.tokenizer.decode(written)
            stop = next((own for own in stops if own in text), None)
            if stop:
                text, reason = text[: text.index(stop)], "stop"
                break
        return {"text": text, "finish_reason": reason, "stop_reason": stop, "ids": written, "logprobs": logprobs}

    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        prompt = asked["prompt"]
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        written = self.write(ids, asked)
        known = written["logprobs"]
        if asked.get("echo"):
            before = self.logprobs(ids)
            known = [None, *(float(before[i, token]) for i, token in enumerate(ids[1:])), *known]
            written["text"] = self.tokenizer.decode(ids) + written["text"]
        choice = {name: written[name] for name in ("text", "finish_reason", "stop_reason")}
        choice["logprobs"] = None if asked.get("logprobs") is None else {"token_logprobs": known}
        return choice | ({"token_ids": written["ids"]} if asked.get("return_token_ids") else {})

    def chat(self, asked: dict[str, Any]) -> dict[str, Any]:
        written = self.write(self.tokenizer(rendered(self.tokenizer, asked["messages"]))["input_ids"], asked)
        message = {"role": "assistant", "content": written["text"]}
        return {"message": message, "finish_reason": written["finish_reason"], "stop_reason": written["stop_reason"]}


def create_app(folder: str) -> FastAPI:
    app, small, faults = FastAPI(), Small(folder), Faults()
    seen: list[dict[str, Any]] = []

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.post("/faults")
    async def plan(request: Request) -> None:
        """Forget all that was planned and seen, and plan this."""
        faults.planned, seen[:] = await request.json(), []

    @app.get("/seen")
    def show() -> list[dict[str, Any]]:
        return seen

    @app.get("/v1/models")
    def names() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "small", "object": "model"}]}

    async def answer(request: Request, write: Any) -> Response:
        body = (await request.body()).decode()
        asked = json.loads(body)
        seen.append({"key": request.headers.get("authorization"), **asked})
        if (fault := await faults.hit(body)) is not None:
            return fault
        if asked["model"] not in ("small", folder):
            return JSONResponse({"error": {"message": f"no model {asked['model']}", "code": "model_not_found"}}, 404)
        return JSONResponse({"choices": [{"index": 0, **await asyncio.to_thread(write, asked)}]})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, small.complete)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, small.chat)

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--port", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    uvicorn.run(create_app(arguments.folder), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
