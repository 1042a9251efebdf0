"""Conversations on disk: JSON to load again, Markdown to read. Nothing is overwritten unasked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mlx_gptoss.errors import GptOssError, RequestError
from mlx_gptoss.harmony import Message

FORMAT = "mlx-gptoss chat"
VERSION = 1


@dataclass
class Transcript:
    """A conversation with what it was led under. saved: local time, ISO 8601."""

    model: str
    saved: str
    instructions: str | None
    reasoning_effort: str
    messages: list[Message] = field(default_factory=list)

    def to_json(self) -> str:
        """As JSON. The sampled tokens are left out: another model's vocabulary may differ."""
        messages = []
        for message in self.messages:
            values = {k: v for k, v in asdict(message).items() if v is not None and k != "token_ids"}
            messages.append(values)
        data = {"format": FORMAT, "version": VERSION, **asdict(self), "messages": messages}
        return json.dumps(data, ensure_ascii=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        """For people: reasoning and tool results folded away."""
        parts = [f"# Chat with {self.model}", f"{self.saved}, reasoning effort {self.reasoning_effort}"]
        if self.instructions:
            parts += ["## Instructions", self.instructions]
        for message in self.messages:
            parts += _markdown(message)
        return "\n\n".join(parts) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Transcript:
        """Raises RequestError when the text is no transcript; `where` names it."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise RequestError(f"{where} is not JSON ({error}): expected a chat that /save wrote") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise RequestError(
                f"{where} is no {FORMAT} of version {VERSION}: expected a file that /save wrote"
            )
        known = {f.name for f in fields(Message)} - {"token_ids"}
        try:
            messages = [Message(**{k: v for k, v in m.items() if k in known}) for m in data["messages"]]
            effort, instructions = data["reasoning_effort"], data["instructions"]
            return cls(str(data["model"]), str(data["saved"]), instructions, effort, messages)
        except (KeyError, TypeError, AttributeError, GptOssError) as error:
            raise RequestError(f"{where} is damaged ({error}): expected a file that /save wrote") from None


def _markdown(message: Message) -> list[str]:
    def folded(title: str, text: str) -> list[str]:
        return ["<details><summary>" + title + "</summary>", _fenced(text), "</details>"]

    if message.role == "user":
        return ["## User", message.content]
    if message.role == "tool":
        return folded(f"Result of {message.name or message.call_id}", message.content)
    if message.recipient is not None:
        return folded(f"Call of {message.recipient}", message.content)
    if message.channel == "analysis":
        return folded("Reasoning", message.content)
    return [f"## {message.role.capitalize()}", message.content]


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


class Saver:
    """Writes transcripts as NAME.json and NAME.md. It replaces only what it wrote itself."""

    def __init__(self) -> None:
        self._written: dict[Path, str] = {}

    def save(self, transcript: Transcript, name: str) -> tuple[Path, Path]:
        """The two files written. Raises RequestError when one exists that this saver did not write."""
        base = Path(name).expanduser()
        base = base.with_name(base.name.removesuffix(".json").removesuffix(".md"))
        files = {
            base.with_name(base.name + ".json"): transcript.to_json(),
            base.with_name(base.name + ".md"): transcript.to_markdown(),
        }
        for path in files:
            if path.exists() and not self._is_mine(path):
                raise RequestError(f"{path} exists already: choose another name")
        for path, text in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                raise RequestError(
                    f"{path} cannot be written ({error.strerror}): choose another place"
                ) from None
            self._written[path.resolve()] = text
        first, second = files
        return first, second

    def _is_mine(self, path: Path) -> bool:
        written = self._written.get(path.resolve())
        return written is not None and path.read_text(encoding="utf-8", errors="replace") == written


def load_transcript(name: str) -> Transcript:
    """Read NAME or NAME.json. Raises RequestError."""
    path = Path(name).expanduser()
    if not path.is_file() and path.suffix != ".json":
        path = path.with_name(path.name.removesuffix(".md") + ".json")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RequestError(f"{path} cannot be read ({reason}): give a file that /save wrote") from None
    return Transcript.from_json(text, str(path))


def answer_of(messages: Sequence[Message]) -> str:
    """The text of the last answer to the user among messages, "" when there is none."""
    finals: list[Any] = [m for m in messages if m.role == "assistant" and m.channel == "final"]
    return finals[-1].content if finals else ""
