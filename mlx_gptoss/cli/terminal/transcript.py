"""Conversations on disk: JSON to load again, Markdown to read. Nothing is overwritten unasked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mlx_gptoss.errors import GptOssError, RequestError
from mlx_gptoss.files import read_limited, state_folder
from mlx_gptoss.harmony import Message

MAX_BYTES = 64 * 2**20  # of a saved chat
FORMAT = "mlx-gptoss chat"
VERSION = 1


@dataclass
class Transcript:
    """A conversation and its settings. saved: local time, ISO 8601."""

    model: str
    saved: str
    instructions: str | None
    reasoning_effort: str
    messages: list[Message] = field(default_factory=list)

    def to_json(self) -> str:
        """As JSON. The sampled tokens are left out: another model's vocabulary may differ."""
        data: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self)}
        for message in data["messages"]:
            for name in [k for k, v in message.items() if v is None or k == "token_ids"]:
                del message[name]
        return json.dumps(data, ensure_ascii=False, indent=2) + "\n"

    def to_markdown(self) -> str:
        """For people: reasoning and tool results folded away."""
        parts = [f"# Chat with {self.model}", f"{self.saved}, reasoning effort {self.reasoning_effort}"]
        parts += ["## Instructions", self.instructions] if self.instructions else []
        parts += map(_markdown, self.messages)
        return "\n\n".join(parts) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Transcript:
        """Raises RequestError for anything else than a transcript; `where` names it."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where} is not JSON ({error}): expected a chat that /save wrote") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            wanted = f"{FORMAT} of version {VERSION}"
            raise RequestError(f"{where} is not a {wanted}: expected a file that /save wrote")
        known = {f.name for f in fields(Message)} - {"token_ids"}
        try:
            messages = [Message(**{k: v for k, v in m.items() if k in known}) for m in data["messages"]]
            effort, instructions = data["reasoning_effort"], data["instructions"]
            return cls(str(data["model"]), str(data["saved"]), instructions, effort, messages)
        except (KeyError, TypeError, AttributeError, GptOssError) as error:
            raise RequestError(f"{where} is damaged ({error}): expected a file that /save wrote") from None


def _markdown(message: Message) -> str:
    if message.role == "tool":
        title = f"Result of {message.name or message.call_id}"
    elif message.recipient is not None:
        title = f"Call of {message.recipient}"
    elif message.channel == "analysis":
        title = "Reasoning"
    else:
        return f"## {message.role.capitalize()}\n\n{message.content}"
    fence = "```"
    while fence in message.content:
        fence += "`"
    shown = f"{fence}\n{message.content}\n{fence}"
    return f"<details><summary>{title}</summary>\n\n{shown}\n\n</details>"


class Saver:
    """Writes transcripts as NAME.json and NAME.md. It replaces only what it wrote itself, or loaded.

    name: of the last one written or loaded.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._written: dict[Path, str] = {}

    def loaded(self, transcript: Transcript, name: str) -> None:
        """The chat of these files goes on: they may be replaced, as long as they hold what was loaded."""
        first, second = _files(name)
        self._written[first.resolve()] = transcript.to_json()
        self._written[second.resolve()] = transcript.to_markdown()
        self.name = name

    def save(self, transcript: Transcript, name: str) -> tuple[Path, Path]:
        """The two files written. Raises RequestError when one exists that this saver did not write."""
        first, second = _files(name)
        for path in (first, second):
            if path.exists() and not self._is_mine(path):
                raise RequestError(f"{path} exists already: choose another name")
        for path, text in ((first, transcript.to_json()), (second, transcript.to_markdown())):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            except OSError as error:
                reason = error.strerror
                raise RequestError(f"{path} cannot be written ({reason}): choose another place") from None
            self._written[path.resolve()] = text
        self.name = name
        return first, second

    def _is_mine(self, path: Path) -> bool:
        written = self._written.get(path.resolve())
        return written is not None and path.read_text(encoding="utf-8", errors="replace") == written


def _files(name: str) -> tuple[Path, Path]:
    """NAME.json and NAME.md. Raises RequestError when it is no name."""
    base = Path(name).expanduser()
    if not base.name:
        raise RequestError(f"{name!r} names no file: give a name such as chat")
    base = base.with_name(base.name.removesuffix(".json").removesuffix(".md"))
    return base.with_name(f"{base.name}.json"), base.with_name(f"{base.name}.md")


def load_transcript(name: str) -> Transcript:
    """Read NAME or NAME.json. Raises RequestError."""
    path = Path(name).expanduser()
    if not path.exists() or path.suffix == ".md":
        path, _ = _files(name)
    try:
        text = read_limited(path, MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RequestError(f"{path} cannot be read ({reason}): give a file that /save wrote") from None
    return Transcript.from_json(text, str(path))


def last_chat() -> Path:
    """Where the last chat is kept, for --resume."""
    return state_folder() / "last_chat.json"


def keep(transcript: Transcript) -> None:
    """Keep a chat as the last one, readable by its owner only. Raises OSError."""
    path = last_chat()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(transcript.to_json())
    os.replace(temporary, path)


def answer_of(messages: Sequence[Message]) -> str:
    """The text of the last answer to the user among messages, "" when there is none."""
    answers = (m.content for m in reversed(messages) if m.role == "assistant" and m.channel == "final")
    return next(answers, "")
