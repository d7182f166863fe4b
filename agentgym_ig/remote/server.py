"""The client of an OpenAI-compatible server: many requests at once, each with its own retries and its own outcome."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any, Literal

import httpx
import orjson
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set

from agentgym_ig.errors import ContextTooLong, ServerFailed, ServerUnavailable

Endpoint = Literal["chat/completions", "completions"]
Choice = dict[str, Any]
"""One entry of the reply's `choices`, as the server sent it."""

LONGEST_PAUSE = 60.0
"""Seconds; a server that asks for more is tried again after these."""

_PASSING = frozenset({408, 409, 425, 429})
_TOO_LONG = re.compile(
    r"context[ _](length|window|size|limit)|max(imum|_)[ ]?(model|prompt|input)[ _]len|prompt is too long"
    r"|longer than the model|too many tokens|`inputs` tokens \+ `max_new_tokens`",
    re.IGNORECASE,
)


class OpenAIServer:
    """Sends requests to one model of an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`, …).

    What may pass (no connection, no answer in time, an answer that is no JSON, status 408, 409, 425, 429 and 5xx) is
    tried again after growing pauses, or after what `Retry-After` asks for. Safe to share between policies, judges
    and threads: `concurrency` counts for all of them. Close it, or use it as a context manager.

    Args:
        base_url: such as `http://127.0.0.1:8000` or `https://host/v1`; without a path, `/v1` is added.
        model: the name that the server knows it by.
        api_key: sent as `Authorization: Bearer KEY`, and never shown.
        timeout: seconds without a byte before an attempt counts as failed; an answer comes in one piece at its end.
        attempts: how often a request is tried in all.
        concurrency: requests under way at once.
        pause: seconds before the second attempt; doubles with each.

    Raises ValueError for an address or a key that can be none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        attempts: int = 5,
        concurrency: int = 32,
        pause: float = 0.5,
    ) -> None:
        if attempts < 1 or concurrency < 1 or timeout <= 0:
            raise ValueError(f"attempts={attempts}, concurrency={concurrency}, timeout={timeout}: all must be above 0")
        self.url, self.model, self._key = _address(base_url), model, _checked(api_key)
        self.timeout, self.attempts, self.pause = timeout, attempts, pause
        self._closed = Event()
        self._client = httpx.Client(
            timeout=timeout,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="openai-server")

    def __repr__(self) -> str:
        return f"OpenAIServer({self.url!r}, {self.model!r})"

    def __enter__(self) -> OpenAIServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the pauses before further attempts, wait for requests under way, and close the connections."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def ask(self, endpoint: Endpoint, bodies: Sequence[Mapping[str, Any]]) -> list[Choice | ServerFailed]:
        """The first choice of the answer to each request, in order; the error in place of one that failed.

        The model's name is added to each body, and fields that are None are left out.
        """
        pending = [self._pool.submit(self._outcome, endpoint, body) for body in bodies]
        try:
            wait(pending)
        except BaseException:  # Ctrl-C: what has not been sent yet never is
            for future in pending:
                future.cancel()
            raise
        return [future.result() for future in pending]

    def models(self) -> list[str]:
        """The names that `GET /v1/models` lists. Raises ServerFailed where it lists none."""
        try:
            listed = orjson.loads(self._client.get(f"{self.url}/models").raise_for_status().content)
            return [str(entry["id"]) for entry in listed["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ServerFailed(f"{self.url}/models lists no models ({error!r})") from error

    def wait(self, tries: int = 60) -> None:
        """Until the server lists its models: with growing pauses of up to 10 seconds, so for some minutes.

        Raises ServerFailed when it never does, or lists others than the model.
        """
        retrying = Retrying(
            stop=stop_after_attempt(tries) | stop_when_event_set(self._closed),
            sleep=sleep_using_event(self._closed),
            wait=wait_random_exponential(multiplier=self.pause, max=10.0),
            retry=retry_if_exception_type(ServerFailed),
            reraise=True,
        )
        names = retrying(self.models)
        if self.model not in names:
            raise ServerFailed(f"{self.url} is back, but without {self.model!r}: it offers {', '.join(names)}")

    def _outcome(self, endpoint: Endpoint, body: Mapping[str, Any]) -> Choice | ServerFailed:
        fields = {name: value for name, value in {"model": self.model, **body}.items() if value is not None}
        # lone surrogates, that UTF-8 cannot carry, become question marks
        content = json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace")
        retrying = Retrying(
            stop=stop_after_attempt(self.attempts) | stop_when_event_set(self._closed),
            sleep=sleep_using_event(self._closed),
            wait=self._wait,
            retry=retry_if_exception_type(ServerUnavailable),
            reraise=True,
        )
        try:
            return retrying(self._post, f"{self.url}/{endpoint}", content)
        except ServerFailed as error:
            return error

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.pause if isinstance(error, ServerUnavailable) else 0.0
        growing = wait_random_exponential(multiplier=self.pause, max=LONGEST_PAUSE)(state)
        return max(growing, min(asked, LONGEST_PAUSE))

    def _post(self, url: str, content: bytes) -> Choice:
        try:
            response = self._client.post(url, content=content, headers={"Content-Type": "application/json"})
        except httpx.TimeoutException as error:
            raise ServerUnavailable(
                f"{url} did not answer within {self.timeout:g} s ({type(error).__name__});"
                " raise timeout, or lower concurrency or max_tokens"
            ) from error
        except httpx.HTTPError as error:
            raise ServerUnavailable(f"{url} cannot be reached: {self._hide(str(error))}; is the server up?") from error
        if response.status_code != 200:
            raise self._refused(url, response)
        try:
            reply = orjson.loads(response.content)
        except ValueError as error:
            raise ServerUnavailable(f"{url} answered no JSON: {self._hide(response.text)[:300]!r}") from error
        if (choice := _first_choice(reply)) is None:
            said = self._hide(response.text)[:300]
            raise ServerFailed(f"{url} answered no completion: {said!r}; is it an OpenAI-compatible server?")
        return choice

    def _refused(self, url: str, response: httpx.Response) -> ServerFailed:
        code, words = response.status_code, _words(response)
        said = f"{url} answered {code}: {self._hide(words or response.text)[:500]}"
        if code != 429 and _TOO_LONG.search(words):
            return ContextTooLong(f"{said}; let the server take more, or lower max_turns, top_k or max_tokens")
        if code in _PASSING or code >= 500:
            return ServerUnavailable(said, _retry_after(response))
        if code in (401, 403):
            return ServerFailed(f"{said}; give an api_key that may use the model {self.model!r}")
        if code == 404:
            return ServerFailed(f"{said}; {self._offer()}")
        return ServerFailed(said)

    def _offer(self) -> str:
        try:
            names = self.models()
        except ServerFailed as error:
            return f"{error}: check base_url"
        if self.model in names:
            return f"the server has the model {self.model!r}, but not this endpoint: take the other one"
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        return f"asked for {self.model!r}, but the server offers {', '.join(names[:20]) or 'no models'}{more}"

    def _hide(self, text: str) -> str:
        """Some servers say which key they have refused."""
        return text.replace(self._key, "[api_key]") if self._key else text


def _address(base_url: str) -> str:
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL as error:
        raise ValueError(
            f"base_url={base_url!r} is no address: {error}; give one such as http://host:8000/v1"
        ) from None
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise ValueError("base_url must look like http://host:8000/v1, without user, password or query: use api_key")
    return str(url.copy_with(path=url.path.rstrip("/") or "/v1"))


def _checked(api_key: str | None) -> str | None:
    key = api_key.strip() if api_key else None
    if key and not (key.isascii() and key.isprintable()):
        raise ValueError("api_key holds characters that no key has; was more than the key read from its file?")
    return key or None


def _first_choice(reply: Any) -> Choice | None:
    try:
        choice: Choice = reply["choices"][0]
        written = choice["text"] if "text" in choice else choice["message"].get("content")
        return choice if "finish_reason" in choice and isinstance(written, str | None) else None
    except (KeyError, IndexError, TypeError, AttributeError):
        return None


def _words(response: httpx.Response) -> str:
    """What the server says went wrong; empty where it says so in no form that is known."""
    try:
        said = orjson.loads(response.content)
    except ValueError:
        return ""
    said = said.get("error", said) if isinstance(said, dict) else said
    if isinstance(said, dict):
        parts = [said.get(name) for name in ("message", "detail", "type", "code")]
        return " ".join(part for part in parts if isinstance(part, str))
    return said if isinstance(said, str) else ""


def _retry_after(response: httpx.Response) -> float:
    """Seconds from a `Retry-After` header, that holds them or a date (RFC 9110, §10.2.3); 0 without one."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value)
        return seconds if 0 <= seconds < float("inf") else 0.0
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):  # no date, or one without a zone
        return 0.0
