"""A server with the scripted LLM in a process of its own, which can be killed.

python -m tests.page.scripted_server PORT FOLDER: prints its address when it listens.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlx_gptoss.server import ServerSettings, create_app
from mlx_gptoss.server.run import make_server
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.scripted_llm import Script, ScriptedLLM


class KillableServer:
    """The process, on a port that stays the same. folder: for its tokenizer."""

    def __init__(self, port: int, folder: Path) -> None:
        self._command = [sys.executable, "-m", "tests.page.scripted_server", str(port), str(folder)]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> str:
        """Start it; its address, once it listens."""
        root = Path(__file__).parents[2]
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        """End it without a word, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def main() -> None:
    """Serve until killed."""
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(exist_ok=True)
    llm = ScriptedLLM(byte_tokenizer(folder))
    llm.write = lambda *_: Script(text="A few words. " * 60, delay=0.004)  # most of a second
    app = create_app(llm, ServerSettings(port=port))  # type: ignore[arg-type]
    make_server(app, lambda url: print(url, flush=True)).run()


if __name__ == "__main__":
    main()
