"""The chat's commands, settings and transcripts, over a scripted model and the real engine."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mlx_gptoss.cli import run
from mlx_gptoss.cli.options import ModelSource
from mlx_gptoss.cli.terminal.chat import Chat, Settings
from mlx_gptoss.cli.terminal.prompt import history_file
from mlx_gptoss.cli.terminal.transcript import Saver, Transcript, load_transcript
from mlx_gptoss.errors import RequestError
from mlx_gptoss.harmony import Message
from tests.support.scripted_model import ScriptedModel, scripted_engine


def said_last(context: str) -> str:
    return context.rsplit("<|message|>", 1)[1].split("<|end|>")[0]


def script(context: str) -> str:
    said = said_last(context)
    answer = '{"n": 7}' if "# Response Formats" in context else f"You said: {said}"
    return (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{answer}<|return|>"
    )


class Typed:
    """What a user types; an exception is raised in its place."""

    def __init__(self, *inputs: str | type[BaseException]) -> None:
        self._inputs = iter(inputs)

    def ask(self) -> str:
        item = next(self._inputs, EOFError)
        if isinstance(item, str):
            return item
        raise item


Talk = Callable[..., tuple[str, Chat, ScriptedModel]]


@pytest.fixture
def talk() -> Iterator[Talk]:
    """Type things into a chat: what was shown, the chat, and the model."""
    engine, model = scripted_engine(script)

    def converse(*inputs: str | type[BaseException], **settings: object) -> tuple[str, Chat, ScriptedModel]:
        shown = io.StringIO()
        console = Console(file=shown, width=200, height=50, highlight=False)
        chat = Chat(engine, Settings(**settings), console)  # type: ignore[arg-type]
        chat.run(Typed(*inputs))
        return shown.getvalue(), chat, model

    with engine:
        yield converse


def users(chat: Chat) -> list[str]:
    return [m.content for m in chat._session.history if m.role == "user"]


def test_messages_are_answered_and_remembered(talk: Talk) -> None:
    shown, chat, model = talk("one", "  ", "two")
    assert "You said: one" in shown and "You said: two" in shown
    assert "<|message|>You said: one<|end|>" in model.contexts[-1]
    assert users(chat) == ["one", "two"]
    assert "tokens/s" in shown and "cached)" in shown


def test_ctrl_c_at_the_prompt_does_not_leave_and_ctrl_d_does(talk: Talk) -> None:
    shown, _chat, _ = talk(KeyboardInterrupt, "still here", EOFError, "never asked")
    assert "You said: still here" in shown and "never asked" not in shown
    assert "Ctrl-D or /exit leaves" in shown


def test_exit_leaves(talk: Talk) -> None:
    shown, _, _ = talk("/exit", "never asked")
    assert "never asked" not in shown


def test_undo_takes_back_and_reset_forgets(talk: Talk) -> None:
    shown, chat, model = talk("one", "two", "/undo", "three")
    assert users(chat) == ["one", "three"]
    assert "two" not in model.contexts[-1]
    assert "took back: two" in shown
    shown, chat, model = talk("one", "/reset", "two")
    assert users(chat) == ["two"] and "one" not in model.contexts[-1]
    assert "there is nothing to take back" in talk("/undo")[0]


def test_effort_and_system_change_what_the_model_is_told_and_keep_the_conversation(talk: Talk) -> None:
    shown, chat, model = talk("one", "/effort high", "/system Be brief.", "two", "/effort", "/system")
    assert "Reasoning: high" in model.contexts[-1]
    assert "Be brief." in model.contexts[-1]
    assert users(chat) == ["one", "two"]
    assert "reasoning effort: high" in shown and "instructions: Be brief." in shown
    _, _, model = talk("/system x", "/system -", "four", instructions="y")
    assert "four" in model.contexts[-1] and "# Instructions" not in model.contexts[-1]


def test_wrong_commands_are_told_and_change_nothing(talk: Talk) -> None:
    shown, chat, _ = talk("/effort enormous", "/nonsense", "/load", "/load nowhere", "one")
    assert "error: reasoning effort 'enormous': expected one of low, medium, high" in shown
    assert "error: /nonsense is not a command: /help lists them" in shown
    assert "error: /load needs the name" in shown
    assert "nowhere.json cannot be read" in shown
    assert users(chat) == ["one"]


def test_a_space_makes_a_message_of_what_looks_like_a_command(talk: Talk) -> None:
    assert users(talk(" /etc/hosts?")[1]) == [" /etc/hosts?"]


def test_help_names_every_command(talk: Talk) -> None:
    shown, chat, _ = talk("/help")
    for name in ("/reset", "/undo", "/effort", "/system", "/save", "/load", "/tools", "/stats", "/help"):
        assert name in shown and name in chat.commands


def test_stats_and_tools_report(talk: Talk) -> None:
    shown, _, _ = talk("one", "/stats", "/tools", tools=[said_last])
    assert "answers" in shown and "of which" in shown and "KV caches" in shown
    assert "said_last" in shown


def test_reasoning_is_shown_when_asked_for(talk: Talk) -> None:
    assert "Hm." not in talk("one")[0]
    assert "Hm." in talk("one", show_reasoning=True)[0]
    assert "Hm." in talk("/reasoning", "one")[0]


def test_a_conversation_that_does_not_fit_is_told_and_not_kept(talk: Talk) -> None:
    shown, chat, _ = talk("x" * 30000, "one")
    assert "error: the prompt has" in shown and "You said: one" in shown
    assert users(chat) == ["one"]


def test_a_stopped_answer_stays_in_the_conversation(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_gptoss.cli.terminal.answer import AnswerView
    from mlx_gptoss.harmony import TextDelta

    show = AnswerView.show

    def interrupted(self: AnswerView, event: object) -> None:
        show(self, event)  # type: ignore[arg-type]
        if isinstance(event, TextDelta) and self.text == "You said: long":
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerView, "show", interrupted)
    shown, chat, _ = talk("long winded", "two")
    assert "stopped: the conversation goes on from here" in shown
    assert users(chat) == ["long winded", "two"]
    assert chat._session.history[1] == Message.assistant("You said: long")


def test_a_chat_is_saved_and_loaded_again(talk: Talk, tmp_path: Path) -> None:
    name = str(tmp_path / "deep" / "talk")
    shown, *_ = talk("/effort low", "/system Be ünique.", "one", f"/save {name}", "two", f"/save {name}")
    assert "saved" in shown and "exists already" not in shown
    text = (tmp_path / "deep" / "talk.md").read_text(encoding="utf-8")
    assert "## User\n\none" in text and "## Assistant\n\nYou said: two" in text and "Be ünique." in text
    shown, again, model = talk(f"/load {name}", "three")
    assert users(again) == ["one", "two", "three"]
    assert "Reasoning: low" in model.contexts[-1] and "Be ünique." in model.contexts[-1]
    assert "loaded 2 messages of yours with scripted" in shown and "You said: two" in shown


def test_no_file_is_overwritten_unasked(talk: Talk, tmp_path: Path) -> None:
    target = tmp_path / "talk.json"
    target.write_text("precious", encoding="utf-8")
    shown, _, _ = talk("one", f"/save {tmp_path / 'talk'}")
    assert "talk.json exists already: choose another name" in shown
    assert target.read_text(encoding="utf-8") == "precious"
    assert not (tmp_path / "talk.md").exists()


def transcript() -> Transcript:
    messages = [
        Message.user("add ```x```"),
        Message.reasoning("hm\n```\ncode"),
        Message.tool_call("add", '{"a": 1}', "call_1"),
        Message.tool_result("2", name="functions.add", call_id="call_1"),
        Message("assistant", "It is 2. é", "final", token_ids=(1, 2)),
    ]
    return Transcript("demo", "2026-01-02T03:04:05", None, "medium", messages)


def test_transcripts_come_back_without_the_tokens_of_the_model(tmp_path: Path) -> None:
    path, _ = Saver().save(transcript(), str(tmp_path / "t.json"))
    assert path == tmp_path / "t.json"
    loaded = load_transcript(str(path))
    assert loaded.messages[:-1] == transcript().messages[:-1]
    assert loaded.messages[-1] == Message("assistant", "It is 2. é", "final")


def test_what_was_changed_since_is_not_replaced(tmp_path: Path) -> None:
    saver = Saver()
    path, _ = saver.save(transcript(), str(tmp_path / "t"))
    saver.save(transcript(), str(tmp_path / "t"))
    path.write_text("edited", encoding="utf-8")
    with pytest.raises(RequestError, match="exists already"):
        saver.save(transcript(), str(tmp_path / "t"))
    with pytest.raises(RequestError, match="exists already"):
        Saver().save(transcript(), str(tmp_path / "t"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a mlx-gptoss chat"),
        ('{"format": "mlx-gptoss chat", "version": 2}', "of version 1"),
        ('{"format": "mlx-gptoss chat", "version": 1}', "is damaged"),
        (
            json.dumps(
                {
                    "format": "mlx-gptoss chat",
                    "version": 1,
                    "model": "m",
                    "saved": "s",
                    "instructions": None,
                    "reasoning_effort": "low",
                    "messages": [{"role": "king", "content": "x"}],
                }
            ),
            "is damaged",
        ),
    ],
)
def test_a_file_that_is_not_a_transcript_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        load_transcript(str(path))


def test_the_history_of_inputs_lies_in_the_state_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "mlx-gptoss" / "chat_history"


# ------------------------------------------------------------------------------ piped, and generate --chat


@pytest.fixture
def piped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run a command with text on standard input: exit status, stdout, stderr."""
    engine, _ = scripted_engine(script)
    monkeypatch.setattr(ModelSource, "load", lambda self: engine)
    monkeypatch.setattr(ModelSource, "local", lambda self: replace(self, model=str(engine.folder)))

    def call(*args: object, text: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        status = run([str(a) for a in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    with engine:
        yield call


def test_a_piped_chat_prints_the_answer_only(piped: Callable[..., tuple[int, str, str]]) -> None:
    assert piped("chat", "m", text="hello\nthere") == (0, "You said: hello\nthere\n", "")


def test_a_piped_chat_shows_reasoning_on_stderr_when_asked(
    piped: Callable[..., tuple[int, str, str]],
) -> None:
    status, out, err = piped("chat", "m", "--show-reasoning", text="hello")
    assert (status, out) == (0, "You said: hello\n")
    assert "Hm." in err


def test_a_piped_chat_needs_a_message(piped: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = piped("chat", "m", text=" \n")
    assert (status, out) == (1, "")
    assert err.startswith("error: there is nothing to answer") and err.count("\n") == 1


def test_generate_answers_in_the_chat_format(piped: Callable[..., tuple[int, str, str]]) -> None:
    options = ["--chat", "--system", "Be brief.", "--effort", "high"]
    assert piped("generate", "m", "-p", "hello", *options) == (0, "You said: hello\n", "")


def test_generate_follows_a_schema(piped: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}}))
    status, out, err = piped("generate", "m", "-p", "n?", "--chat", "--schema", schema, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["parsed"] == {"n": 7}
    assert report["text"] == '{"n": 7}' and report["reasoning"] == "Hm."
    assert report["finish_reason"] == "stop" and report["usage"]["reasoning_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--system", "x"], 2, "--system needs --chat"),
        (["--schema", "x"], 2, "--schema needs --chat"),
        (["--show-reasoning"], 2, "--show-reasoning needs --chat"),
        (["--chat", "--tokens", "1"], 2, "not both"),
        (["--chat", "--schema", "/nowhere.json"], 1, "/nowhere.json: No such file"),
        (["--chat", "--schema", __file__], 1, "is not JSON"),
    ],
)
def test_what_does_not_go_together_is_told(
    piped: Callable[..., tuple[int, str, str]], options: list[str], status: int, message: str
) -> None:
    got, out, err = piped("generate", "m", "-p", "x", *options)
    assert (got, out) == (status, "")
    assert message in err


def test_tools_are_enabled_by_name_and_refused_without_what_they_need(
    piped: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    status, _, err = piped("chat", "m", "--tool", "browser", text="x")
    assert status == 1 and "give it a folder of pages" in err
    assert piped("chat", "m", "--tool", "browser", "--pages", tmp_path, text="x")[0] == 0
    assert piped("chat", "m", "--tool", "shell", text="x")[0] == 2
