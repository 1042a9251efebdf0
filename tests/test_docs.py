"""The documentation says what the commands say of themselves, and every block of it runs as it stands.

A page is run in a folder of its own, with the demo model in the place of OpenAI's: a stand-in of the Hub has
it as `openai/gpt-oss-20b`, and `MODEL`, `FOLDER` and the like are folders of these names. First come the
lines of the page's `sh` blocks, in order, each in a shell; then all its `python` blocks as one script, whose
line numbers are the page's.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_gptoss.convert.convert import convert
from mlx_gptoss.convert.recipes import make_recipe
from tests.support.hub_server import HubServer
from tests.support.tuning import style_rows, write_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
DEMO = ROOT / "mlx_gptoss" / "demo_model"
LANGUAGES = {"sh", "python", "text", "js", "json", "toml", "yaml"}
ADDRESS = "127.0.0.1:8000"

# Lines of shell that are not run, and why.
NOT_RUN = {
    "hf auth login": "asks for the user's token of the Hub",
    f"ANTHROPIC_BASE_URL=http://{ADDRESS} ANTHROPIC_API_KEY=none claude": "Claude Code needs Node",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, and its lines with the number of the first."""

    language: str
    first: int
    lines: tuple[str, ...]


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S):
        first = text.count("\n", 0, match.start(3)) + 1
        yield Block(match[2], first, tuple(textwrap.dedent(match[3]).splitlines()))


def commands(page: Path) -> list[str]:
    """The lines of the page's shell blocks, without comments; a backslash joins a line with the next."""
    text = "\n".join("\n".join(block.lines) for block in blocks(page) if block.language == "sh")
    found = text.replace("\\\n", " ").splitlines()
    return [line for line in found if shlex.split(line, comments=True)]


def script(page: Path) -> str:
    """The page's Python, every line where the page has it."""
    lines = [""] * page.read_text(encoding="utf-8").count("\n")
    for block in blocks(page):
        if block.language == "python":
            lines[block.first - 1 : block.first - 1 + len(block.lines)] = block.lines
    return "\n".join(lines)


def check_form(command: list[str]) -> bool:
    """Whether this sets up or trains, which is not run: then its targets, extras or modules must exist."""
    match command:
        case ["make", target, *_] if target != "demo":
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"no target {target}"
        case ["pip" | "pipx", "install", *arguments] | ["uv", "tool", "install", *arguments]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = re.findall(r"(?:\.|gptoss-mlx)\[([\w,]+)\]", " ".join(arguments))
            assert {e for found in extras for e in found.split(",")} <= set(project["optional-dependencies"])
        case ["python", "-m", module, *arguments]:
            spec = importlib.util.find_spec(module)
            assert spec is not None and spec.origin is not None, f"no module {module}"
            source = Path(spec.origin).read_text(encoding="utf-8")
            assert all(f'"{a}"' in source for a in arguments if a.startswith("--")), arguments
        case _:
            return False
    return True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a context and a length of answers that bound what an unlucky sample can cost."""
    folder = tmp_path_factory.mktemp("model") / "demo"
    shutil.copytree(DEMO, folder)
    for name, change in (
        ("config.json", {"max_position_embeddings": 4096}),
        ("generation_config.json", {"max_new_tokens": 192}),
    ):
        config = json.loads((DEMO / name).read_text())
        (folder / name).write_text(json.dumps(config | change))
    return folder


@pytest.fixture(scope="module")
def hub(model: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo("openai/gpt-oss-20b", {file.name: file.read_bytes() for file in model.iterdir()})
        yield server


@pytest.fixture(scope="module")
def conversion(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model converted from OpenAI's repository."""
    with pytest.MonkeyPatch.context() as patch:
        hub.use(patch, tmp_path_factory.mktemp("cache"))
        folder = tmp_path_factory.mktemp("converted") / "FOLDER"
        return convert("openai/gpt-oss-20b", folder, make_recipe("mxfp4-q4")).folder


def furnish(folder: Path, page: Path, model: Path, conversion: Path) -> None:
    """Put what the page's blocks take for given into the folder: models, texts, a repository of git."""
    text = page.read_text(encoding="utf-8")
    for name in ("MODEL", "SOURCE", "SRC", "openai-gpt-oss-20b"):
        if name in text:
            shutil.copytree(model, folder / name)
    for name in ("FOLDER", "gpt-oss-20b-q4"):
        if name in text and page.name != "convert.md":  # which makes its own
            shutil.copytree(conversion, folder / name)
    (folder / "text.txt").write_text("Alice was beginning to get very tired of sitting by her sister. " * 3)
    (folder / "rivers.schema.json").write_text(
        '{"type": "array", "items": {"type": "string"}, "maxItems": 3}'
    )
    time = {"command": sys.executable, "args": ["-m", "mcp_server_time", "--local-timezone", "UTC"]}
    (folder / "mcp.json").write_text(json.dumps({"mcpServers": {"time": time}}))
    write_rows(folder / "answers.jsonl", style_rows("docs", 12))
    (folder / "notes").mkdir()
    (folder / "notes" / "bees.md").write_text("# Bees\n\nBees dance.\n")
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([*git, "add", "notes"], cwd=folder, check=True)
    (folder / "notes" / "bees.md").write_text("# Bees\n\nBees dance in the dark.\n")


class Shell:
    """Runs a page's commands in its folder. A server goes on in the background until the end."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder = folder
        self.address = ADDRESS
        self.stack = ExitStack()
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_CACHE": str(folder / ".cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_stand_in",
            "XDG_STATE_HOME": str(folder / ".state"),
        }

    def run(self, command: str | list[str]) -> str:
        if isinstance(command, str):
            if shlex.split(command, comments=True)[:2] == ["mlx-gptoss", "serve"]:
                self.serve(shlex.split(command, comments=True))
                return ""
            if shlex.split(command, comments=True) == ["make", "demo"]:
                command = "mlx-gptoss demo"  # what it runs once it has set itself up
            command = ["sh", "-c", command.replace(ADDRESS, self.address)]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            input="What is 17 + 25?\n",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def serve(self, command: list[str]) -> None:
        process = subprocess.Popen(
            [*command, "--port", "0"],
            cwd=self.folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stack.enter_context(process)
        self.stack.callback(process.terminate)
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening on http://(\S+:\d+)", line):
                self.address = found[1]
            if "ready" in line:
                return
        raise AssertionError(f"{command} never got ready")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, hub: HubServer, model: Path, conversion: Path, tmp_path: Path) -> None:
    furnish(tmp_path, page, model, conversion)
    shell = Shell(tmp_path, hub)
    with shell.stack:
        for command in commands(page):
            line = shlex.split(command, comments=True)
            if shlex.join(line) not in NOT_RUN and not check_form(line):
                shell.run(command)
        code = script(page)
        if code.strip():
            (tmp_path / f"{page.stem}_page.py").write_text(code.replace(ADDRESS, shell.address))
            shell.run([sys.executable, f"{page.stem}_page.py"])


@pytest.mark.parametrize("command", NOT_RUN)
def test_what_is_not_run_is_still_there(command: str) -> None:
    assert any(shlex.join(shlex.split(c, comments=True)) == command for page in PAGES for c in commands(page))
    pytest.skip(NOT_RUN[command])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_of_a_language_and_parses(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall("^ *```", text, re.M)) == 2 * len(list(blocks(page)))
    assert not re.findall(r"^    (?:mlx-gptoss|pip|python|make|git|curl) .*", text, re.M), (
        "put it into a block of sh"
    )
    for block in blocks(page):
        assert block.language in LANGUAGES, f"line {block.first}: {block.language!r}"
        code = "\n".join(block.lines)
        match block.language:
            case "python":
                compile(code, page.name, "exec")
            case "json":
                json.loads(code)
            case "toml":
                tomllib.loads(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_page_leads_to_its_heading(page: Path) -> None:
    for target, anchor in re.findall(
        r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8")
    ):
        other = page.parent / target if target else page
        assert other.exists(), target
        headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_example_runs(example: Path, hub: HubServer, tmp_path: Path) -> None:
    assert Shell(tmp_path, hub).run([sys.executable, str(example)])


def test_cli_reference_is_in_step_with_the_help() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_cli_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
