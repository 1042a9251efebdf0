"""The request of /v1/completions: raw text or token ids, without the chat format."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from mlx_gptoss.errors import ContextLengthError, RequestError
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.server.openai.choices import ChoicesRequest
from mlx_gptoss.server.translate.request import Items
from mlx_gptoss.server.translate.sampling_fields import sampling_params
from mlx_gptoss.tokenizer import Tokenizer

# Forms of an answer, which the chat format has a place for.
FORMS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
IN_CHAT = "ask for a form at /v1/chat/completions"
DEFAULT_MAX_TOKENS = 16  # as OpenAI documents it

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(ChoicesRequest):
    prompt: str | Items[TokenId] | Items[str] | Items[Items[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    skip_special_tokens: bool | None = None

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None

    unsupported: ClassVar = {"suffix": "gpt-oss does not fill in the middle"} | dict.fromkeys(FORMS, IN_CHAT)

    @property
    def scores_prompt(self) -> bool:
        """Whether the tokens of the prompt are to be scored as well."""
        return bool(self.echo) and self.logprobs is not None


def sampling_of(request: CompletionRequest) -> SamplingParams:
    """How to sample. Raises RequestError for what is asked and cannot be done."""
    request.refuse_unsupported()
    if request.best_of not in (None, request.n or 1):
        raise RequestError("best_of is not supported: ask for n answers and choose yourself", "best_of")
    return sampling_params(
        request,
        {},
        max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else max(1, request.max_tokens),
        stop=request.stop,
        logit_bias=request.logit_bias,
        logprobs=request.logprobs,
    )


def read_prompts(prompt: Any, tokenizer: Tokenizer, max_context: int) -> dict[str, list[int]]:
    """One or several prompts as token ids, under the names that the request has for them.

    Texts that spell special tokens are ordinary text. Raises ContextLengthError before a text that is surely
    longer than the context has been tokenised to its end.
    """
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    listed = prompt if several else [prompt]
    prompts = {}
    for index, one in enumerate(listed):
        where = f"prompt[{index}]" if len(listed) > 1 else "prompt"
        if isinstance(one, str) and (beyond := tokenizer.count_beyond(one, max_context)):
            raise ContextLengthError(beyond, max_context, where, at_least=True)
        tokens = tokenizer.encode(one) if isinstance(one, str) else one
        if not tokens:
            raise RequestError(f"{where} is empty: send a text or token ids", where)
        wrong = next((token for token in tokens if token >= tokenizer.vocab_size), None)
        if wrong is not None:
            raise RequestError(f"{where} holds token {wrong}: ids go to {tokenizer.vocab_size - 1}", where)
        prompts[where] = tokens
    return prompts
