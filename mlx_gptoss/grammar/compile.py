"""From a request's fields (tools, tool_choice, schema, regex, ...) to the constraint of its reply."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mlx_gptoss.errors import RequestError, SchemaError, ToolError
from mlx_gptoss.grammar import headers
from mlx_gptoss.grammar.headers import Target
from mlx_gptoss.grammar.matcher import Vocabulary, vocabulary_of
from mlx_gptoss.grammar.references import check_schema_references
from mlx_gptoss.grammar.response_format import ResponseFormat
from mlx_gptoss.grammar.schema import arguments_schema, schema_error, schema_grammar
from mlx_gptoss.grammar.turn import Plan, TurnConstraint
from mlx_gptoss.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlx_gptoss.harmony import Tool, ToolNamespace

ToolChoice: TypeAlias = Literal["auto", "none", "required"] | tuple[Literal["named"], str]
# Target -> the schema of its arguments and whether it must be enforced; None for free text (python's code).
Calls: TypeAlias = dict[Target, tuple[dict[str, Any], bool] | None]


def compile_constraint(
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Tool] = (),
    builtin: Sequence[ToolNamespace] = (),
    tool_choice: ToolChoice = "auto",
    strict_tools: bool = True,
    response_format: ResponseFormat | None = None,
    reasoning_budget: int | None = None,
    called: bool = False,
) -> TurnConstraint | None:
    """The constraint of a reply, or None when the request constrains nothing.

    tools, builtin: function tools and built-in namespaces that the model has been shown. tool_choice:
    "auto", "none", "required", or ("named", name). strict_tools: False lets a call's arguments be any JSON
    object where the tool's schema uses keywords that cannot be enforced, instead of raising.
    response_format: what the final message is. reasoning_budget: analysis tokens in this turn at most,
    >= 0. called: whether the history holds calls, which a model without tools would go on making.

    Raises SchemaError (unusable schema or grammar, naming the keyword), ToolError (tool_choice does not fit
    the tools) or RequestError.
    """
    if reasoning_budget is not None and (type(reasoning_budget) is not int or reasoning_budget < 0):
        raise RequestError(
            f"reasoning_budget is {reasoning_budget!r}: expected a whole number of tokens >= 0",
            "reasoning_budget",
        )
    final = response_format.grammar() if response_format is not None else None
    calls = _calls(tools, builtin)
    chosen = _choose(calls, tool_choice)
    if not calls and final is None and reasoning_budget is None and not called:
        return None

    vocabulary = vocabulary_of(tokenizer)
    bodies: dict[Target, str] = {}
    for target, arguments in chosen.items():
        if arguments is not None:
            schema, strict = arguments
            bodies[target] = _argument_grammar(vocabulary, target, schema, strict and strict_tools)
    targets: list[Target] = [headers.ANALYSIS, *chosen]
    if chosen:
        targets.append(headers.PREAMBLE)
    must_call = tool_choice not in ("auto", "none")
    if not must_call:
        is_json = response_format is not None and response_format.is_json
        answer = headers.FINAL_JSON if is_json else headers.FINAL
        targets.append(answer)
        if response_format is not None and final is not None:
            # Compiled now, so that a bad one fails before anything is generated.
            try:
                vocabulary.admit(final)
            except ValueError as error:
                raise response_format.error(error) from None
            bodies[answer] = final
    plan = Plan(tuple(targets), bodies, must_call or final is not None, reasoning_budget)
    return TurnConstraint(tokenizer, vocabulary, plan)


def _calls(tools: Sequence[Tool], builtin: Sequence[ToolNamespace]) -> Calls:
    """The calls that can be made."""
    calls: Calls = {}
    for i, tool in enumerate(tools):
        schema = arguments_schema(tool.parameters, f"tools[{i}].parameters")
        calls[headers.function_call(tool.name)] = schema, tool.strict
    for namespace in builtin:
        if not namespace.tools:
            calls[headers.builtin_call(namespace.name)] = None
        for tool in namespace.tools:
            recipient = f"{namespace.name}.{tool.name}"
            schema = arguments_schema(tool.parameters, recipient)
            calls[headers.builtin_call(recipient)] = schema, tool.strict
    return calls


def _choose(calls: Calls, tool_choice: ToolChoice) -> Calls:
    """The calls that tool_choice permits."""
    if tool_choice == "none":
        return {}
    if tool_choice == "required" and not calls:
        raise ToolError("tool_choice is 'required' and there are no tools: declare one", "tool_choice")
    if tool_choice in ("auto", "required"):
        return calls
    if isinstance(tool_choice, tuple) and len(tool_choice) == 2 and tool_choice[0] == "named":
        wanted = str(tool_choice[1]).removeprefix("functions.")
        chosen = {target: arguments for target, arguments in calls.items() if target.name == wanted}
        if not chosen:
            declared = ", ".join(target.name for target in calls) or "none"
            raise ToolError(f"tool_choice names {wanted!r}: the declared tools are {declared}", "tool_choice")
        return chosen
    raise ToolError(
        f"tool_choice is {tool_choice!r}: expected 'auto', 'none', 'required' or ('named', a tool's name)",
        "tool_choice",
    )


def _argument_grammar(
    vocabulary: Vocabulary, target: Target, parameters: dict[str, Any], strict_tools: bool
) -> str:
    field = f"parameters of {target.name}"
    try:
        check_schema_references(parameters, field)
        grammar = schema_grammar(parameters)
        vocabulary.admit(grammar)
        return grammar
    except (ValueError, SchemaError) as error:
        if not strict_tools:
            return schema_grammar({"type": "object"})
        if isinstance(error, SchemaError):
            raise
        raise schema_error(str(error), parameters, field) from None
