"""`mlx-gptoss generate`: completion of a text (or of token ids), raw or in the chat format, to stdout.

The text is only the text: what was measured goes to stderr as one last line.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlx_gptoss.cli.options import (
    ChatOptions,
    ModelSource,
    chat_options,
    model_options,
    read_standard_input,
    sampling_options,
)
from mlx_gptoss.errors import GptOssError, RequestError

if TYPE_CHECKING:
    from mlx_gptoss.engine.request import TokenStream
    from mlx_gptoss.llm import LLM
    from mlx_gptoss.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 256


@click.command()
@model_options
@click.option("-p", "--prompt", help="Text to continue.  [default: standard input]")
@click.option(
    "--tokens", metavar="IDS", help="Token ids to continue, e.g. '1 2 3'; prints ids and needs no tokenizer."
)
@sampling_options(max_tokens=DEFAULT_MAX_TOKENS)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of a stream.")
@click.option(
    "--chat",
    "as_chat",
    is_flag=True,
    help="Answer the prompt in the chat format; as many tokens as it takes, unless --max-tokens is given.",
)
@chat_options
@click.option(
    "--schema",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --chat: a JSON schema that the answer follows.",
)
def generate(
    source: ModelSource,
    prompt: str | None,
    tokens: str | None,
    sampling: SamplingParams,
    as_json: bool,
    as_chat: bool,
    talk: ChatOptions,
    schema: Path | None,
) -> None:
    """Continue a text with MODEL: raw, or with --chat as the answer to a message."""
    if prompt is not None and tokens is not None:
        raise click.UsageError("give --prompt or --tokens, not both")
    _check_chat(as_chat, tokens)
    if as_chat and _is_default("max_tokens"):
        sampling = replace(sampling, max_tokens=None)
    request = _chat_request(talk, sampling, schema) if as_chat else None
    ids = parse_tokens(tokens) if tokens is not None else []
    text = _read_prompt(prompt) if tokens is None else ""
    source = source.local()
    if tokens is None and not (Path(source.model) / "tokenizer.json").is_file():
        from mlx_gptoss.tokenizer import Tokenizer

        Tokenizer.from_folder(source.model)  # tells what is missing before gigabytes of weights are read
    with source.load() as llm:
        if request is not None:
            run_chat(llm, text, request, show_reasoning=talk.show_reasoning, as_json=as_json)
        else:
            ids = ids or llm.tokenizer.encode(text)
            run_raw(llm, ids, sampling, as_ids=tokens is not None, as_json=as_json)


def _is_default(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is ParameterSource.DEFAULT


def _check_chat(as_chat: bool, tokens: str | None) -> None:
    """What belongs to --chat, or not. Raises UsageError."""
    if as_chat and tokens is not None:
        raise click.UsageError("--chat takes a text, not --tokens")
    given = [name for name in ("system", "effort", "show_reasoning", "schema") if not _is_default(name)]
    if given and not as_chat:
        raise click.UsageError(f"--{given[0].replace('_', '-')} needs --chat")


def _chat_request(talk: ChatOptions, params: SamplingParams, schema: Path | None) -> dict[str, Any]:
    """The arguments of LLM.stream. Raises RequestError for a schema file that is not JSON, or OSError."""
    request: dict[str, Any] = {
        "instructions": talk.system,
        "reasoning_effort": talk.effort,
        "current_date": date.today().isoformat(),
        "params": params,
    }
    if schema is not None:
        try:
            request["schema"] = json.loads(schema.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{schema} is not JSON ({error}): give a JSON schema", "schema") from None
    return request


def run_chat(llm: LLM, message: str, request: dict[str, Any], *, show_reasoning: bool, as_json: bool) -> None:
    """Answer a message: the text as it comes, or one JSON object with all of the reply."""
    from mlx_gptoss.cli.terminal.once import answer_once

    if not as_json:
        answer_once(llm.stream(message, **request), show_reasoning=show_reasoning)
        return
    reply = llm.respond(message, **request)
    report = {
        "text": reply.text,
        "reasoning": reply.reasoning,
        "parsed": reply.parsed,
        "finish_reason": reply.finish_reason,
        "usage": asdict(reply.usage),
    }
    click.echo(json.dumps(report, ensure_ascii=False))


def parse_tokens(text: str) -> list[int]:
    """Token ids out of '1 2 3' or '1,2,3'. Raises RequestError."""
    words = re.split(r"[\s,]+", text.strip())
    for word in words:
        if not re.fullmatch(r"\d{1,9}", word):
            raise RequestError(f"--tokens has {word!r}: expected whole numbers, such as '1 2 3'", "tokens")
    return [int(word) for word in words]


def _read_prompt(prompt: str | None) -> str:
    """The text of --prompt, else of standard input. Raises RequestError when it is empty or not UTF-8."""
    from mlx_gptoss.tokenizer import check_text

    if prompt is None:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: give one with -p, or on standard input")
        prompt = read_standard_input()
    if not prompt:
        raise RequestError("the prompt is empty: give at least one character", "prompt")
    check_text(prompt, "the prompt", "prompt")
    return prompt


def run_raw(llm: LLM, ids: list[int], params: SamplingParams, *, as_ids: bool, as_json: bool) -> None:
    """Generate after `ids`, show the output as it comes (or one JSON object), then the measured line."""
    produced: list[int] = []
    text: list[str] = []
    stream = llm.submit(ids, params)
    try:
        for piece in _pieces(llm, stream, produced, params.stop, as_ids=as_ids):
            text.append(piece)
            if not as_json:
                click.echo(piece, nl=False)
                sys.stdout.flush()
    except BaseException as error:
        stream.cancel()
        if text and not as_json and isinstance(error, GptOssError):
            click.echo()  # the error's line begins on a line of its own
        raise
    figures = _measured(stream)
    if as_json:
        click.echo(json.dumps({"text": None if as_ids else "".join(text), "tokens": produced} | figures))
    else:
        click.echo()
        click.echo(_speed_line(figures), err=True)


def _pieces(
    llm: LLM, stream: TokenStream, produced: list[int], stops: tuple[str, ...], *, as_ids: bool
) -> Iterator[str]:
    """The output as it may be shown; every token id is appended to `produced`."""
    if as_ids:
        for output in stream:
            produced.append(output.token_id)
            yield f"{' ' if len(produced) > 1 else ''}{output.token_id}"
        return
    from mlx_gptoss.chat.stops import UntilStop

    detokenizer, shown, special = llm.tokenizer.detokenizer(), UntilStop(stops), llm.tokenizer.stop_ids
    for output in stream:
        produced.append(output.token_id)
        if output.token_id not in special:
            yield shown.push(detokenizer.push(output.token_id))
    yield shown.push(detokenizer.finish())
    yield shown.finish()


def _measured(stream: TokenStream) -> dict[str, Any]:
    """What a finished stream took; seconds, bytes, and None where there was nothing to measure."""
    from mlx_gptoss.device import peak_memory

    first, rest = stream.time_to_first_token, stream.decode_seconds
    computed, decoded = stream.prompt_tokens - stream.cached_tokens, stream.completion_tokens - 1
    return {
        "finish_reason": stream.finish_reason,
        "prompt_tokens": stream.prompt_tokens,
        "cached_tokens": stream.cached_tokens,
        "completion_tokens": stream.completion_tokens,
        "prompt_tokens_per_second": computed / first if first else None,
        "decode_tokens_per_second": decoded / rest if rest and decoded > 0 else None,
        "time_to_first_token": first,
        "peak_memory": peak_memory(),
    }


def _speed_line(figures: dict[str, Any]) -> str:
    def at(rate: float | None) -> str:
        return "" if rate is None else f" at {rate:.1f} tokens/s"

    first = figures["time_to_first_token"]
    return (
        f"prompt: {figures['prompt_tokens']} tokens{at(figures['prompt_tokens_per_second'])}; "
        f"output: {figures['completion_tokens']} tokens{at(figures['decode_tokens_per_second'])}; "
        f"{'' if first is None else f'first after {first:.2f} s, '}"
        f"peak memory {figures['peak_memory'] / 1e9:.2f} GB"
    )
