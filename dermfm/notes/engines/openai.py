"""Any OpenAI-compatible server (vLLM, SGLang, Ollama, a hosted one): <url>/chat/completions.

Requests go out together, as many as `server.concurrency` allows and within its rate limits. What may pass by itself (a
full server, a cut connection, half an answer, a hang) is asked for again after growing pauses, no sooner than the
server's Retry-After says; anything else is the request's error. The key comes from the environment and goes nowhere
but into the header: not into messages, not into notes.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import tenacity

from dermfm.config import InputError, nearest, short_hash
from dermfm.notes.engines.pictures import chat, data_url
from dermfm.notes.engines.protocol import EngineConfig, Generation, Request, ServerConfig
from dermfm.notes.engines.schema import decodable, most_tokens, settle
from dermfm.notes.engines.seat import Seat

PASSES = (408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529)
FIRST_PAUSE_S = 0.5
CHECK_S = 20.0
TOKENS_AN_IMAGE = 1000
Json = dict[str, Any]


class Busy(Exception):  # noqa: N818  it says what happened
    """The server could not answer this time; `pause_s` is how long it asks to wait."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class Refused(Exception):  # noqa: N818
    """The server will not answer this request, however often it is asked."""


class Budget:
    """A rate limit: so much a minute, refilled all the time; what is taken beyond waits."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute, self.left, self.at = per_minute, per_minute or 0.0, time.monotonic()

    async def take(self, amount: float) -> None:
        """Wait until `amount` is there (or all of a minute's, where it is more), and take it."""
        if self.per_minute is None:
            return
        while True:
            now = time.monotonic()
            self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
            self.at = now
            needed = min(amount, self.per_minute) - self.left
            if needed <= 1e-6:
                self.left -= amount
                return
            await asyncio.sleep(needed * 60 / self.per_minute)

    def correct(self, amount: float) -> None:
        """So much more was used than taken (less, where negative)."""
        self.left -= amount


class OpenAIEngine:
    """Asks one server. Rate limits hold over all calls of one engine."""

    takes_images = True  # only the server knows; a text-only one answers with an error

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.server = config, config.server
        self._headers, self._key = _headers(config.server)
        self._requests = Budget(self.server.requests_per_minute)
        self._tokens = Budget(self.server.tokens_per_minute)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """One generation a request; a request that cannot be done has an error, and no other suffers from it."""
        return asyncio.run(self._all(requests))

    async def _all(self, requests: Sequence[Request]) -> list[Generation]:
        limit = asyncio.Semaphore(self.server.concurrency)
        timeout = aiohttp.ClientTimeout(total=self.server.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=self._headers) as session:
            return list(await asyncio.gather(*(self._one(session, limit, r) for r in requests)))

    async def _one(self, session: aiohttp.ClientSession, limit: asyncio.Semaphore, request: Request) -> Generation:
        async with limit:
            try:
                body = await asyncio.to_thread(self.body, request)
                return await self._patiently(session, body, request)
            except InputError:  # no other request would fare better
                raise
            except (Busy, Refused, ValueError) as error:
                return Generation("", error=self._clean(str(error)))

    async def _patiently(self, session: aiohttp.ClientSession, body: Json, request: Request) -> Generation:
        grow = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=self.server.longest_pause_s)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.pause_s if isinstance(error, Busy) else 0.0
            return min(max(grow(state), asked), self.server.longest_pause_s)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Busy),
            stop=tenacity.stop_after_attempt(self.server.tries),
            wait=pause,
            reraise=True,
        )
        return await retrying(self._ask, session, body, request)

    async def _ask(self, session: aiohttp.ClientSession, body: Json, request: Request) -> Generation:
        """One try."""
        expected = _tokens_of(request) + body[self.server.limit_field]
        await self._requests.take(1)
        await self._tokens.take(expected)
        try:
            async with session.post(f"{self.server.url}/chat/completions", json=body) as answer:
                text = await answer.text(errors="replace")
                if answer.status in PASSES:
                    raise Busy(f"{answer.status} {_reason(text)}", _retry_after(answer.headers.get("Retry-After")))
                if answer.status == 401:
                    raise _refused_key(self.server, answer.status)
                if answer.status != 200:
                    raise Refused(f"{answer.status} {_reason(text)}")
        except asyncio.TimeoutError as error:
            raise Busy(f"no answer within {self.server.timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Busy(f"connection: {_named(error)}") from error
        try:
            found = json.loads(text)
            generation = _generation(found, request)
        except (json.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise Busy(f"half an answer or none of this API: {_reason(text)}") from error
        used = (found.get("usage") or {}).get("total_tokens")
        if used is not None:
            self._tokens.correct(used - expected)
        return generation

    def body(self, request: Request) -> Json:
        """The request as the API takes it; ValueError where its image cannot be read."""
        config = self.config
        image = None
        if request.image is not None:
            image = {"type": "image_url", "image_url": {"url": data_url(request.image, self.server.image_side)}}
        body: Json = {
            "model": config.model,
            "messages": chat(request, image),
            "temperature": config.retry_temperature if request.attempt else config.temperature,
            "seed": int(short_hash([request.seed, request.attempt])[:7], 16),
            self.server.limit_field: most_tokens(request.schema, config.max_new_tokens),
        }
        if request.schema is not None:
            schema = {"name": "note", "schema": decodable(request.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _clean(self, text: str) -> str:
        """Without the key, which some servers repeat."""
        return " ".join((text.replace(self._key, "***") if self._key else text).split())[:300]


def prepare(config: EngineConfig) -> str:
    """Ask the server for the model; InputError where it is not reached, refuses the key or does not have the model."""
    if not config.server.check:
        return config.revision or ""
    status, text = asyncio.run(_models(config.server))
    if status in (401, 403):
        raise _refused_key(config.server, status)
    if status >= 500 or status == 429:
        raise InputError(f"engine.server.url: {config.server.url} answers {status}; see that the server is up")
    try:
        names = [model["id"] for model in json.loads(text)["data"]] if status == 200 else []
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"engine.server.url: {config.server.url}/models is no OpenAI-compatible API; a version belongs to the "
            "address (…/v1)"
        ) from error
    if names and config.model not in names:
        raise InputError(
            f"engine.model: {config.server.url} has no model '{config.model}'; {nearest(config.model, names)}"
        )
    return config.revision or ""  # a server without a list of models is taken at its word


def takes_images(config: EngineConfig) -> bool:
    """Nobody can tell from outside; a text-only model's error comes with the first notes."""
    return True


def weight_bytes(config: EngineConfig) -> int:
    """They lie elsewhere."""
    return 0


def build(config: EngineConfig, seat: Seat | None = None) -> OpenAIEngine:
    """The engine."""
    return OpenAIEngine(config)


def _refused_key(server: ServerConfig, status: int) -> InputError:
    variable = server.key_variable
    held = f"refuses the key in ${variable}" if os.environ.get(variable) else f"wants a key; ${variable} is not set"
    return InputError(f"engine.server.key_variable: {server.url} {held} ({status})")


def _headers(server: ServerConfig) -> tuple[dict[str, str], str]:
    held = os.environ.get(server.key_variable, "").strip()
    if not held:
        return {}, ""
    if not held.isprintable() or not held.isascii():
        raise InputError(f"engine.server.key_variable: ${server.key_variable} holds characters that no key has")
    return {"Authorization": f"Bearer {held}"}, held


async def _models(server: ServerConfig) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=min(CHECK_S, server.timeout_s))
    headers, _ = _headers(server)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.get(f"{server.url}/models") as answer,
        ):
            return answer.status, await answer.text(errors="replace")
    except asyncio.TimeoutError as error:
        raise InputError(f"engine.server.url: {server.url} does not answer within {timeout.total:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise InputError(f"engine.server.url: {server.url} cannot be reached ({_named(error)})") from error


def _named(error: Exception) -> str:
    return str(error) or type(error).__name__


def _generation(found: Json, request: Request) -> Generation:
    """What the answer says; ValueError where it is whole but not valid under the request's schema."""
    choice = found["choices"][0]
    message, reason = choice["message"], choice.get("finish_reason")
    tokens = int((found.get("usage") or {}).get("completion_tokens") or 0)
    if message.get("refusal") or reason == "content_filter":
        return Generation(message.get("refusal") or message.get("content") or "", tokens, refused=True)
    text = message["content"].strip()
    if request.schema is not None:
        if reason == "length":
            raise ValueError("the answer is no whole JSON: the server cut it at the token limit")
        text = settle(request.schema, text)
    return Generation(text, tokens, finished=reason != "length")


def _tokens_of(request: Request) -> int:
    """About as many tokens as the prompt has."""
    text = sum(len(content) for _, content in request.messages) // 4
    return text + (TOKENS_AN_IMAGE if request.image is not None else 0)


def _reason(text: str) -> str:
    """The server's own words about an error, shortened."""
    try:
        told = json.loads(text)
        told = told.get("error", told)
        return str(told.get("message", told) if isinstance(told, dict) else told)[:200]
    except (json.JSONDecodeError, AttributeError):
        return text[:200]


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 where there is none."""
    if not value:
        return 0.0
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0
