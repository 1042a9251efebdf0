"""What a reply may look like: constraints on the tokens of one assistant turn, aware of harmony's channels.

    constraint = compile_constraint(tokenizer, response_format=ResponseFormat.of(regex="yes|no"))

Reasoning stays free, the final channel follows a grammar, tool-call headers name declared tools only, and
their arguments follow the tool's JSON schema. `llguidance` turns grammars into token masks; the walk over
channels is in `turn`.
"""

from mlx_gptoss.grammar.compile import ToolChoice, compile_constraint
from mlx_gptoss.grammar.response_format import ResponseFormat
from mlx_gptoss.grammar.schema import Schema, json_schema_of, parse_reply
from mlx_gptoss.grammar.turn import TurnConstraint

__all__ = [
    "ResponseFormat",
    "Schema",
    "ToolChoice",
    "TurnConstraint",
    "compile_constraint",
    "json_schema_of",
    "parse_reply",
]
