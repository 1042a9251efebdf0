"""The chat's commands, settings and transcripts, over a scripted model and the real engine."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mlx_gptoss.cli import run
from mlx_gptoss.cli.options import ModelSource
from mlx_gptoss.cli.terminal.answer import AnswerView
from mlx_gptoss.cli.terminal.chat import Chat
from mlx_gptoss.cli.terminal.clipboard import program
from mlx_gptoss.cli.terminal.prompt import history_file
from mlx_gptoss.cli.terminal.talk import Settings
from mlx_gptoss.cli.terminal.transcript import Saver, Transcript, last_chat, load_transcript
from mlx_gptoss.errors import RequestError
from mlx_gptoss.harmony import Message
from mlx_gptoss.llm import load
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
    return [m.content for m in chat.talk.session.history if m.role == "user"]


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


def test_the_last_reasoning_can_be_opened_again(talk: Talk) -> None:
    shown, _, _ = talk("one", "/reasoning last")
    assert "/reasoning last shows it" in shown and "Hm." in shown
    assert "has no reasoning" in talk("/reasoning last")[0]
    assert "expected nothing, or last" in talk("/reasoning first")[0]


def test_the_last_message_is_answered_again(talk: Talk) -> None:
    shown, chat, model = talk("one", "two", "/retry")
    assert shown.count("You said: two") == 2 and users(chat) == ["one", "two"]
    assert model.contexts[-1].count("You said: two") == 0
    assert "no message yet" in talk("/retry")[0]


def test_a_retry_that_is_stopped_leaves_the_old_answer(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    _, chat, _ = talk("one")
    before = list(chat.talk.session.history)

    def stopped(self: AnswerView, event: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerView, "show", stopped)
    chat.run(Typed("/retry"))
    assert chat.talk.session.history == before


@pytest.fixture
def editor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Sets an editor that writes this text."""

    def use(text: str) -> None:
        (tmp_path / "text").write_text(text, encoding="utf-8")
        script = tmp_path / "editor"
        script.write_text(f'#!/bin/sh\ncat {tmp_path / "text"} > "$1"\n')
        script.chmod(0o755)
        monkeypatch.setenv("VISUAL", str(script))

    return use


def test_the_last_message_is_edited_and_answered(talk: Talk, editor: Callable[[str], None]) -> None:
    editor("two\nlines\n")
    shown, chat, _ = talk("one", "/edit")
    assert users(chat) == ["two\nlines"] and "You said: two" in shown
    assert users(talk("/edit")[1]) == ["two\nlines"]  # the first message is written there as well
    editor("one\n")
    shown, chat, _ = talk("one", "/edit")
    assert "not changed" in shown and users(chat) == ["one"]


def test_an_editor_that_is_not_there_is_told(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL", "/no/such/editor")
    assert "set $EDITOR to your editor" in talk("one", "/edit")[0]


def test_an_answer_goes_to_the_clipboard(talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SSH_CONNECTION", "WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert "there is no answer" in talk("/copy")[0]
    shown, *_ = talk("one", "/copy")
    assert "\x1b]52;c;" + base64.b64encode(b"You said: one").decode() + "\a" in shown
    assert "copied 13 characters through the terminal" in shown
    program = tmp_path / "wl-copy"
    program.write_text(f"#!/bin/sh\ncat > {tmp_path / 'clipboard'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "copied 13 characters with wl-copy" in talk("one", "/copy")[0]
    assert (tmp_path / "clipboard").read_text() == "You said: one"
    program.write_text("#!/bin/sh\nexit 3\n")
    assert "was not copied: wl-copy ended with 3; /save" in talk("one", "/copy")[0]


@pytest.mark.parametrize(
    ("environment", "system", "command"),
    [
        ({}, "darwin", "pbcopy"),
        ({"DISPLAY": ":0"}, "linux", "xclip"),
        ({"WAYLAND_DISPLAY": "w", "DISPLAY": ":0"}, "linux", "wl-copy"),
        ({"SSH_CONNECTION": "a b"}, "darwin", None),
        ({}, "linux", None),
    ],
)
def test_the_clipboard_is_that_of_the_users_desktop(
    tmp_path: Path, environment: dict[str, str], system: str, command: str | None
) -> None:
    for name in ("pbcopy", "xclip", "wl-copy"):
        (tmp_path / name).touch(0o755)
    found = program({**environment, "PATH": str(tmp_path)}, system)
    assert (found and found[0]) == command


def test_files_go_with_the_next_message(talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "my notes.md"
    path.write_text("bees dance\n", encoding="utf-8")
    quoted = str(path).replace(" ", "\\ ")
    shown, chat, _ = talk(f"/file {path}", f"/file '{path}'", f"/file {quoted}", "/file", "why?", "again")
    assert users(chat) == ["\n\n".join([f"{path}:\n```\nbees dance\n```"] * 3 + ["why?"]), "again"]
    assert re.search(r"\d+ tokens, sent with your next message", " ".join(shown.split()))
    assert users(talk(f"/file {path}", "/file -", "why?")[1]) == ["why?"]
    shown, chat, _ = talk("/file /dev/zero", f"/file {sys.executable}", f"/file {tmp_path}", "/file")
    assert "not a regular file" in shown and "expected a text file" in shown and "no files;" in shown


def test_the_status_line_tells_how_many_experts_are_in_memory() -> None:
    shown = io.StringIO()
    with load("demo", expert_memory="750kB", max_context=512) as llm:
        chat = Chat(llm, Settings(), Console(file=shown, width=200, highlight=False))
        assert "experts" not in chat.talk.status()
        llm.logits([1, 2, 3])
        chat.run(Typed("/stats", "/reset"))
        assert re.search(r" tokens · \d+% of experts in memory · /help$", chat.talk.status())
    assert re.search(r"experts +[\d.]+% of those chosen were in memory; .* GB read", shown.getvalue())


def test_the_status_line_is_right_at_every_moment(talk: Talk, tmp_path: Path) -> None:
    def context(chat: Chat) -> int:
        found = re.fullmatch(r"scripted · ([\d,]+) of 20,000 tokens · /help", chat.talk.status())
        assert found is not None
        return int(found[1].replace(",", ""))

    empty = context(talk()[1])
    one = context(talk("one")[1])
    assert 0 < empty < one < context(talk("one", "two")[1])
    assert context(talk("one", "two", "/undo")[1]) == one
    assert context(talk("one", "/reset")[1]) == empty
    assert context(talk("one", f"/save {tmp_path / 'a'}", "two", f"/load {tmp_path / 'a'}")[1]) == one
    assert context(talk("one", "/system Be brief.")[1]) > one


def test_commands_have_the_names_that_people_type(talk: Talk) -> None:
    for leave in ("/quit", "/bye", "/exit"):
        assert "never asked" not in talk(leave, "never asked")[0]
    assert users(talk("one", "/clear", "two")[1]) == ["two"]
    assert "/retry" in talk("/?")[0]
    assert "did you mean /retry?" in talk("/rety")[0]


def test_the_last_chat_is_kept_and_resumed(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    talk("/effort low", "one", "two")
    talk()  # a chat without a word leaves the last one
    assert last_chat().stat().st_mode & 0o777 == 0o600
    _, chat, model = talk()
    chat.go_on(str(last_chat()))
    chat.run(Typed("three"))
    assert users(chat) == ["one", "two", "three"] and "Reasoning: low" in model.contexts[-1]
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/no")
    assert talk("one", "two")[0].count("cannot be kept for --resume") == 1


def test_a_conversation_that_does_not_fit_is_told_and_not_kept(talk: Talk) -> None:
    shown, chat, _ = talk("x" * 30000, "one")
    assert "error: the prompt has" in shown and "You said: one" in shown
    assert users(chat) == ["one"]


def test_a_stopped_answer_stays_in_the_conversation(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert chat.talk.session.history[1] == Message.assistant("You said: long")


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


def test_a_loaded_chat_is_saved_under_its_name_again(talk: Talk, tmp_path: Path) -> None:
    name = str(tmp_path / "talk")
    talk("one", f"/save {name}")
    shown, *_ = talk(f"/load {name}", "two", "/save")
    assert "exists already" not in shown
    assert users(talk(f"/load {name}")[1]) == ["one", "two"]
    (tmp_path / "talk.md").write_text("edited", encoding="utf-8")
    assert "talk.md exists already" in talk(f"/load {name}", "three", "/save")[0]


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


@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_what_is_no_regular_file_is_no_transcript(path: str) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        load_transcript(path)


def test_a_transcript_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "t.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(RequestError, match="larger than"):
        load_transcript(str(tmp_path / "t"))


def test_the_history_of_inputs_lies_in_the_state_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "mlx-gptoss" / "chat_history"


# ------------------------------------------------------------------------------------- piped, and generate


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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--pages", "."], "--pages is for the browser: add --tool browser"),
        (["--unsafe-python"], "--unsafe-python is for the tool: add --tool python"),
        (["--resume"], "--resume is for a chat in a terminal"),
    ],
)
def test_options_without_effect_are_told(
    piped: Callable[..., tuple[int, str, str]], options: list[str], told: str
) -> None:
    status, out, err = piped("chat", "m", *options, text="x")
    assert (status, out) == (2, "") and told in err and err.count("\n") == 1


def test_a_chat_looks_at_the_model_before_the_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert run(["chat", "/no/such/folder"]) == 1
    assert "no folder '/no/such/folder'" in capsys.readouterr().err


def test_a_piped_chat_needs_a_message(piped: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = piped("chat", "m", text=" \n")
    assert (status, out) == (1, "")
    assert err.startswith("error: there is nothing to answer") and err.count("\n") == 1


def test_generate_answers_in_the_chat_format(piped: Callable[..., tuple[int, str, str]]) -> None:
    options = ["--system", "Be brief.", "--effort", "high"]
    assert piped("generate", "m", "-p", "hello", *options) == (0, "You said: hello\n", "")


def test_files_what_is_piped_in_and_the_prompt_make_one_message(
    piped: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("alpha\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("```\nbeta\n```\n", encoding="utf-8")
    files = ["-f", tmp_path / "a.txt", "-f", tmp_path / "b.md"]
    status, out, _ = piped("generate", "m", *files, "-p", "Compare.", text="from the pipe\n")
    assert status == 0
    assert out == (
        f"You said: {tmp_path / 'a.txt'}:\n```\nalpha\n```\n\n"
        f"{tmp_path / 'b.md'}:\n````\n```\nbeta\n```\n````\n\nfrom the pipe\n\nCompare.\n"
    )


@pytest.mark.parametrize("form", [["--regex", "No|You (said: )?x"], ["--choices", "No, You said: x"]])
def test_an_answer_is_held_to_a_regex_or_to_choices(
    piped: Callable[..., tuple[int, str, str]], form: list[str]
) -> None:
    assert piped("generate", "m", "-p", "x", *form) == (0, "You said: x\n", "")


def test_an_answer_that_was_cut_is_told_on_stderr(piped: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = piped("generate", "m", "-p", "x" * 50, "--max-tokens", 40)
    assert status == 0 and out.startswith("You said: x") and len(out) < 45
    assert err == "the answer was cut: it reached --max-tokens or the end of the context\n"


def test_generate_follows_a_schema(piped: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}}))
    status, out, err = piped("generate", "m", "-p", "n?", "--schema", schema, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report["parsed"] == {"n": 7}
    assert report["text"] == '{"n": 7}' and report["reasoning"] == "Hm."
    assert report["finish_reason"] == "stop" and report["usage"]["reasoning_tokens"] > 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--raw", "--system", "x"], 2, "--system has no effect with --raw"),
        (["--raw", "--schema", "x"], 2, "--schema has no effect with --raw"),
        (["--raw", "--show-reasoning"], 2, "--show-reasoning has no effect with --raw"),
        (["--json", "--show-reasoning"], 2, "--show-reasoning has no effect with --json"),
        (["--chat", "--tokens", "1"], 2, "not both"),
        (["--regex", "a", "--choices", "a,b"], 2, "--regex and --choices were given"),
        (["--choices", " , "], 1, "expected texts such as 'yes,no'"),
        (["--schema", "/nowhere.json"], 1, "/nowhere.json cannot be read: No such file"),
        (["--schema", "/dev/zero"], 1, "/dev/zero cannot be read: not a regular file"),
        (["--schema", __file__], 1, "is not JSON"),
        (["-f", "/nowhere.txt"], 1, "/nowhere.txt cannot be read: No such file"),
        (["-f", sys.executable], 1, "expected a text file"),
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
