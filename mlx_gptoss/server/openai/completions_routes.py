"""POST /v1/completions: raw text or token ids in, raw text out, without the chat format."""

from __future__ import annotations

import time
import uuid
from bisect import bisect_left
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from mlx_gptoss.chat.stops import UntilStop
from mlx_gptoss.errors import RequestError
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.http.errors import error_body
from mlx_gptoss.server.http.openapi import ERRORS
from mlx_gptoss.server.openai.chat_request import SamplingFields, naming
from mlx_gptoss.server.openai.chat_routes import FINGERPRINT
from mlx_gptoss.server.running import sse
from mlx_gptoss.server.running.jobs import Job
from mlx_gptoss.server.running.streams import collect, log_failure
from mlx_gptoss.server.state import ServerState
from mlx_gptoss.server.translate.options import logit_bias, sampling_params, stop_texts
from mlx_gptoss.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # as OpenAI documents it

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(SamplingFields):
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    def refuse_unsupported(self) -> None:
        """RequestError for what is asked and cannot be done."""
        if self.suffix is not None:
            raise RequestError("suffix is not supported: gpt-oss does not fill in the middle", "suffix")
        if self.best_of not in (None, self.n or 1):
            raise RequestError("best_of is not supported: ask for n answers and choose yourself", "best_of")
        if self.echo and self.logprobs is not None:
            raise RequestError("echo with logprobs is not supported: the prompt is not scored", "echo")


def read_prompts(prompt: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """One or several prompts as token ids. Texts that spell special tokens are ordinary text."""
    if isinstance(prompt, str):
        prompts: list[list[int]] = [tokenizer.encode(prompt)]
    elif prompt and isinstance(prompt[0], int):
        prompts = [prompt]
    else:
        prompts = [tokenizer.encode(one) if isinstance(one, str) else one for one in prompt]
    for index, tokens in enumerate(prompts):
        where = prompt_field(index, prompts)
        if not tokens:
            raise RequestError(f"{where} is empty: send at least one token", where)
        wrong = next((token for token in tokens if token >= tokenizer.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"{where} holds token {wrong}: ids go to {tokenizer.vocab_size - 1}", where)
    if not prompts:
        raise RequestError("prompt is empty: send a text or token ids", "prompt")
    return prompts


def prompt_field(index: int, prompts: list[list[int]]) -> str:
    """How the request names one of its prompts."""
    return f"prompt[{index}]" if len(prompts) > 1 else "prompt"


class TextChoice:
    """One completion as it comes: tokens in, pieces of text out, up to a stop text."""

    def __init__(self, tokenizer: Tokenizer, echo: str, stop: tuple[str, ...], scored: bool) -> None:
        self.text = echo
        self.finish_reason: str | None = None
        self.done: Any = None
        self.logprobs: dict[str, list[Any]] | None = None
        if scored:
            self.logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self._tokenizer = tokenizer
        self._letters = tokenizer.detokenizer()
        self._stop = UntilStop(stop)
        self._decoded = 0
        self._told = 0

    def take(self, event: Any) -> str:
        """The text that an event adds."""
        if hasattr(event, "finish_reason"):
            self.done = event
            piece = self._stop.push(self._letters.finish()) + self._stop.finish()
            cut = self._stop.over or event.finish_reason == "cancelled"
            self.finish_reason = "stop" if cut else event.finish_reason
        elif self._stop.over or event.token_id in self._tokenizer.stop_ids:
            piece = ""
        else:
            decoded = self._letters.push(event.token_id)
            self._score(event)
            self._decoded += len(decoded)
            piece = self._stop.push(decoded)
        self.text += piece
        if self.finish_reason and self.logprobs and self._stop.over:  # the stop text's tokens go with it
            count = self._scores_shown()
            self.logprobs = {name: values[:count] for name, values in self.logprobs.items()}
        return piece

    def _score(self, event: Any) -> None:
        if self.logprobs is None or event.logprobs is None:
            return

        def spell(token: int) -> str:
            return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

        self.logprobs["tokens"].append(spell(event.token_id))
        self.logprobs["token_logprobs"].append(max(event.logprobs.logprob, -9999.0))
        self.logprobs["top_logprobs"].append({spell(t): max(p, -9999.0) for t, p in event.logprobs.top})
        self.logprobs["text_offset"].append(self._decoded)

    def _scores_shown(self) -> int:
        """How many of the scored tokens begin within the text so far."""
        return bisect_left(self.logprobs["text_offset"], len(self.text)) if self.logprobs else 0

    def new_scores(self) -> dict[str, list[Any]] | None:
        """The log-probabilities that no call gave before, as far as their text is there.

        Those of text that is held back, because a stop text may begin with it, wait with it.
        """
        if self.logprobs is None:
            return None
        first = self._told
        self._told = len(self.logprobs["tokens"]) if self.finish_reason else self._scores_shown()
        return {name: values[first : self._told] for name, values in self.logprobs.items()}


def usage_body(choices: list[TextChoice], prompts: list[list[int]]) -> dict[str, Any]:
    """Token counts; each prompt is counted once."""
    prompt = sum(map(len, prompts))
    completion = sum(choice.done.completion_tokens for choice in choices if choice.done)
    share = max(1, len(choices) // len(prompts))
    cached = sum(choice.done.cached_tokens for choice in choices[::share] if choice.done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _params(body: CompletionRequest) -> SamplingParams:
    return sampling_params(
        {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "seed": body.seed,
            "max_tokens": body.max_tokens or DEFAULT_MAX_TOKENS,
            "logit_bias": logit_bias(body.logit_bias),
            "stop": stop_texts(body.stop),
            "logprobs": body.logprobs,
        }
    )


def router(state: ServerState) -> APIRouter:
    """The route, bound to a server."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", responses=ERRORS, response_model=None)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Go on from a prompt."""
        engine = state.ready()
        body.refuse_unsupported()
        prompts = read_prompts(body.prompt, engine.tokenizer)
        count = body.n or 1
        if count * len(prompts) > state.settings.max_choices:
            raise RequestError(
                f"{len(prompts)} prompts with n={count}: this server gives "
                f"at most {state.settings.max_choices} choices a request",
                "n",
            )
        params = _params(body)
        choices, starts = [], []
        for number, tokens in enumerate(prompts):
            where = prompt_field(number, prompts)
            echo = engine.tokenizer.decode(tokens) if body.echo else ""
            for index in range(count):
                seeded = params
                if index and params.seed is not None:
                    seeded = SamplingParams(**{**vars(params), "seed": params.seed + index})
                choices.append(TextChoice(engine.tokenizer, echo, params.stop, body.logprobs is not None))
                starts.append(partial(_submit, engine, tokens, seeded, where))
        job = await state.jobs.start(*starts)
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.model_name,
        }
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return sse.EventStream(_stream(job, choices, head, prompts, with_usage), job)
        await collect(job, request, lambda index, event: choices[index].take(event))
        return JSONResponse(
            head
            | {
                "choices": [
                    {"index": i, "text": c.text, "logprobs": c.logprobs, "finish_reason": c.finish_reason}
                    for i, c in enumerate(choices)
                ],
                "usage": usage_body(choices, prompts),
                "system_fingerprint": FINGERPRINT,
            }
        )

    return routes


def _submit(engine: Any, tokens: list[int], params: SamplingParams, where: str, sink: Any) -> Any:
    with naming({"messages": where, "token_ids": where}):
        return engine.submit(tokens, params, sink=sink)


async def _stream(
    job: Job,
    choices: list[TextChoice],
    head: dict[str, Any],
    prompts: list[list[int]],
    with_usage: bool,
) -> AsyncIterator[bytes]:
    """The chunks of a streamed completion."""

    def chunk(index: int, text: str, logprobs: Any = None, reason: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return sse.data(head | {"choices": [choice]})

    yield b"".join(chunk(index, choice.text) for index, choice in enumerate(choices) if choice.text)
    try:
        async for batch in job.batches():
            out = [] if batch else [sse.HEARTBEAT]
            for index, event in batch:
                choice = choices[index]
                text = choice.take(event)
                if text or choice.finish_reason:
                    out.append(chunk(index, text, choice.new_scores(), choice.finish_reason))
            if out:
                yield b"".join(out)
        if with_usage:
            yield sse.data(head | {"choices": [], "usage": usage_body(choices, prompts)})
        yield sse.DONE
    except Exception as error:
        yield sse.data(error_body(log_failure(error)))
