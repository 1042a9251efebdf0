"""`mlx-gptoss generate`: the answer to one prompt, or the continuation of a text or of token ids, on stdout.

The output is only the text: reasoning, progress and what was measured go to stderr.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import date
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlx_gptoss.cli.attachments import read_text, with_files
from mlx_gptoss.cli.options import (
    ChatOptions,
    ModelSource,
    chat_options,
    model_options,
    read_standard_input,
    sampling_options,
)
from mlx_gptoss.cli.prefill import reading_bar, shown_reading
from mlx_gptoss.errors import GptOssError, RequestError
from mlx_gptoss.harmony import Done

if TYPE_CHECKING:
    from mlx_gptoss.engine.request import TokenOutput, TokenStream
    from mlx_gptoss.llm import LLM
    from mlx_gptoss.sampling import SamplingParams

RAW_MAX_TOKENS = 256


@click.command()
@click.option("-p", "--prompt", metavar="TEXT", help="What to say; comes after files and standard input.")
@click.option(
    "-f",
    "--file",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A text file that becomes part of the message, with its name. May be given repeatedly.",
)
@chat_options
@click.option(
    "--schema", type=click.Path(path_type=Path), metavar="FILE", help="A JSON schema that the answer follows."
)
@click.option("--regex", metavar="PATTERN", help="A regular expression that the whole answer matches.")
@click.option("--choices", metavar="A,B,..", help="The answer is one of these texts, set apart by commas.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of a stream.")
@click.option(
    "--tokens", metavar="IDS", help="Token ids to continue, e.g. '1 2 3'; prints ids and needs no tokenizer."
)
@click.option(
    "--chat/--raw",
    "as_chat",
    default=True,
    help="Answer in the chat format, or continue the text as it is.  [default: --chat]",
)
@sampling_options(unset="--chat: by effort; --raw: 256")
@model_options
def generate(
    source: ModelSource,
    prompt: str | None,
    files: tuple[Path, ...],
    tokens: str | None,
    as_chat: bool,
    sampling: SamplingParams,
    as_json: bool,
    talk: ChatOptions,
    schema: Path | None,
    regex: str | None,
    choices: str | None,
) -> None:
    """Answer one prompt with MODEL, and print the answer only.

    The prompt is made of the files, of what is piped in, and of --prompt, in this order. With --raw it is a
    text, which is continued.
    """
    _check_together(prompt is not None or bool(files), tokens is not None, as_chat)
    as_chat = as_chat and tokens is None
    if not as_chat and sampling.max_tokens is None:
        sampling = replace(sampling, max_tokens=RAW_MAX_TOKENS)
    request = _chat_request(talk, sampling, schema, regex, choices) if as_chat else None
    ids = parse_tokens(tokens) if tokens is not None else []
    text = _read_prompt(prompt, files, raw=not as_chat) if tokens is None else ""
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


CHAT_ONLY = ("system", "effort", "show_reasoning", "schema", "regex", "choices")
FORMS = ("schema", "regex", "choices")


def _check_together(prompted: bool, tokens: bool, as_chat: bool) -> None:
    """Options that exclude each other, or would have no effect. Raises UsageError."""
    given = click.get_current_context().get_parameter_source
    named = [name for name in CHAT_ONLY if given(name) is not ParameterSource.DEFAULT]
    forms = [f"--{name}" for name in FORMS if name in named]
    if tokens and prompted:
        raise click.UsageError("give --prompt or --file, or --tokens, not both")
    if tokens and as_chat and given("as_chat") is not ParameterSource.DEFAULT:
        raise click.UsageError("--chat takes a text: leave out --chat or --tokens")
    if named and (tokens or not as_chat):
        other = "--tokens" if tokens else "--raw"
        raise click.UsageError(
            f"--{named[0].replace('_', '-')} has no effect with {other}: leave one of them out"
        )
    if len(forms) > 1:
        raise click.UsageError(f"{' and '.join(forms)} were given: an answer has one form, give one")
    if "show_reasoning" in named and given("as_json") is not ParameterSource.DEFAULT:
        raise click.UsageError("--show-reasoning has no effect with --json, which always has the reasoning")


def _chat_request(
    talk: ChatOptions, params: SamplingParams, schema: Path | None, regex: str | None, choices: str | None
) -> dict[str, Any]:
    """The arguments of LLM.stream. Raises RequestError."""
    request: dict[str, Any] = {
        "instructions": talk.system,
        "reasoning_effort": talk.effort,
        "current_date": date.today().isoformat(),
        "params": params,
    }
    if schema is not None:
        try:
            request["schema"] = json.loads(read_text(schema, "schema"))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{schema} is not JSON ({error}): give a JSON schema", "schema") from None
    if regex is not None:
        request["regex"] = regex
    if choices is not None:
        request["choices"] = [choice.strip() for choice in choices.split(",") if choice.strip()]
        if not request["choices"]:
            raise RequestError(f"--choices is {choices!r}: expected texts such as 'yes,no'", "choices")
    return request


def run_chat(llm: LLM, message: str, request: dict[str, Any], *, show_reasoning: bool, as_json: bool) -> None:
    """Answer a message: the text as it comes, or one JSON object with all of the reply."""
    from mlx_gptoss.cli.terminal.once import answer_once

    events = shown_reading(llm.stream(message, progress=True, **request))
    if not as_json:
        answer_once(events, show_reasoning=show_reasoning)
        return
    *_, done = events
    assert isinstance(done, Done)
    reply = done.reply
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


def _read_prompt(prompt: str | None, files: Sequence[Path], *, raw: bool) -> str:
    """The files, what is piped in, and --prompt. Raises RequestError when that is nothing, or not UTF-8."""
    from mlx_gptoss.tokenizer import check_text

    named = [(str(path), read_text(path)) for path in files]
    piped = ""
    if not sys.stdin.isatty():
        piped = read_standard_input()
    elif prompt is None and not files:
        raise click.UsageError("no prompt: give one with -p or -f, or on standard input")
    if raw:  # a text to continue has no names in it
        text = "".join([*(content for _, content in named), piped, prompt or ""])
    else:
        message = "\n\n".join(part for part in (piped.strip("\n"), prompt) if part)
        text = with_files(message, named)
    if not text:
        raise RequestError("the prompt is empty: give at least one character", "prompt")
    check_text(text, "the prompt", "prompt")
    return text


def run_raw(llm: LLM, ids: list[int], params: SamplingParams, *, as_ids: bool, as_json: bool) -> None:
    """Generate after `ids`, show the output as it comes (or one JSON object), then the measured line."""
    produced: list[int] = []
    text: list[str] = []
    with reading_bar() as show:
        stream = llm.submit(ids, params, progress=show)
        first = list(islice(stream, 1))
    try:
        for piece in _pieces(llm, chain(first, stream), produced, params.stop, as_ids=as_ids):
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
    llm: LLM, outputs: Iterator[TokenOutput], produced: list[int], stops: tuple[str, ...], *, as_ids: bool
) -> Iterator[str]:
    """The output as it may be shown; every token id is appended to `produced`."""
    if as_ids:
        for output in outputs:
            produced.append(output.token_id)
            yield f"{' ' if len(produced) > 1 else ''}{output.token_id}"
        return
    from mlx_gptoss.chat.stops import UntilStop

    detokenizer, shown, special = llm.tokenizer.detokenizer(), UntilStop(stops), llm.tokenizer.stop_ids
    for output in outputs:
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

    from mlx_gptoss.checkpoint.memory import gigabytes

    first = figures["time_to_first_token"]
    return (
        f"prompt: {figures['prompt_tokens']} tokens{at(figures['prompt_tokens_per_second'])}; "
        f"output: {figures['completion_tokens']} tokens{at(figures['decode_tokens_per_second'])}; "
        f"{'' if first is None else f'first after {first:.2f} s, '}"
        f"peak memory {gigabytes(figures['peak_memory'])}"
    )
