"""The tree of errors: every failure a user can cause has a type, and one line that tells the cure.

GptOssError
 ├ ModelNotFoundError      no such folder or Hub id, or not cached while offline
 ├ ConfigError             config.json is missing, contradictory, or not of a gpt-oss model
 ├ CheckpointError         tensors missing, extra or misshapen; files corrupt or truncated
 │  └ AdapterError         no adapter, one of another model, or of a kind that is not known
 ├ TokenizerError          text is needed and the folder has no usable tokenizer
 ├ RequestError            a value in a request is wrong; `.field` names it
 │  ├ ContextLengthError   more tokens than the context holds
 │  ├ SchemaError          a JSON schema, regex or grammar that cannot be used
 │  └ ToolError            a tool declared twice or without a name, a result for an unknown call
 ├ TuneError               examples or settings of a training that cannot be used, or a loss that is NaN
 ├ MemoryLimitError        it does not fit in memory; `.needed` and `.available` in bytes
 ├ BusyError               the queue is full; `.retry_after` in seconds
 ├ HostError               a machine that runs a part of the model failed; `.retry_after` in seconds
 ├ BatchError              some of many prompts failed; `.errors` has each by its index
 ├ ConversionError         a conversion's source or target cannot be used
 │  └ VerificationError    a converted folder differs from its manifest or its source
 └ HubError                a download or an upload failed
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import MappingProxyType


class GptOssError(Exception):
    """Root of every error this package raises on purpose."""


class ModelNotFoundError(GptOssError):
    """No such folder or Hub repository, or it is not cached and the network may not be used."""


class ConfigError(GptOssError):
    """The model's configuration is missing, contradictory, or does not describe a gpt-oss model."""


class CheckpointError(GptOssError):
    """The weights are missing, extra, misshapen, truncated or corrupt."""


class AdapterError(CheckpointError):
    """The adapter is missing, of another model, corrupt, or of a kind that is not known here."""


class TokenizerError(GptOssError):
    """Text was asked for, and the model's folder holds no usable tokenizer."""


class RequestError(GptOssError):
    """A value in a request is wrong. `field` names it, as the caller wrote it."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ContextLengthError(RequestError):
    """The prompt (with what is to be generated) is longer than the context. Counts are tokens.

    at_least: the prompt was not read to its end, and has `prompt_tokens` or more.
    """

    def __init__(
        self,
        prompt_tokens: int,
        max_context: int,
        field: str | None = "messages",
        *,
        at_least: bool = False,
    ) -> None:
        count = f"at least {prompt_tokens:,}" if at_least else f"{prompt_tokens:,}"
        super().__init__(
            f"the prompt has {count} tokens and the context holds {max_context:,}: "
            "shorten the prompt, or load the model with a larger max_context",
            field,
        )
        self.prompt_tokens = prompt_tokens
        self.max_context = max_context
        self.at_least = at_least


class SchemaError(RequestError):
    """A JSON schema, regular expression or grammar that cannot be used; names the part at fault."""


class ToolError(RequestError):
    """A tool is declared wrongly, or a result belongs to no call."""


class TuneError(GptOssError):
    """A training's examples or settings cannot be used, or it has failed."""


class MemoryLimitError(GptOssError):
    """It does not fit in memory. `needed` and `available` are bytes."""

    def __init__(self, message: str, needed: int | None = None, available: int | None = None) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available


class BusyError(GptOssError):
    """The queue is full. `retry_after` is a suggestion in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class HostError(GptOssError):
    """A machine that runs a part of the model failed, or cannot take part.

    `retry_after` is a suggestion in seconds; None when trying again will not help.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BatchError(GptOssError):
    """Some prompts of `respond_many` failed; the others were answered. `errors` has each by its index."""

    def __init__(self, errors: Mapping[int, GptOssError], count: int) -> None:
        index, first = next(iter(errors.items()))
        more = f" (and {len(errors) - 1} more: see .errors)" if len(errors) > 1 else ""
        super().__init__(f"{len(errors)} of {count} prompts failed; prompts[{index}]: {first}{more}")
        self.errors = dict(errors)


class ConversionError(GptOssError):
    """A conversion's source or target cannot be used."""


class VerificationError(ConversionError):
    """A converted folder differs from its manifest or from its source."""


class HubError(GptOssError):
    """A download from, or an upload to, the Hub failed."""


def did_you_mean(
    word: str, known: Iterable[str], other_names: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The end of an error's line: which of the known words was meant, or "" when none is near.

    other_names: what people call them elsewhere -> the known word.
    """
    meant = other_names.get(word) or next(iter(get_close_matches(word, list(known), 1, 0.7)), None)
    return f"; did you mean {meant}?" if meant else ""
