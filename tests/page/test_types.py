"""The page's modules: types, and sizes that can be read in one sitting."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STATIC = HERE.parent.parent / "mlx_gptoss/server/static"
TSC = HERE / "node_modules/.bin/tsc"


@pytest.mark.skipif(not TSC.exists(), reason="`make page` fetches the TypeScript compiler")
def test_types() -> None:
    done = subprocess.run([TSC, "-p", HERE / "tsconfig.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_file_is_longer_than_300_lines() -> None:
    assert not {p.name: n for p in STATIC.iterdir() if (n := p.read_text("utf-8").count("\n")) > 300}


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_evaluated() -> None:
    for path in STATIC.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/", "")
        assert "http://" not in text and "https://" not in text, path.name
        if path.name != "markdown.js":
            assert "innerHTML" not in text, path.name
        assert "eval(" not in text and "style=" not in text and "onclick=" not in text, path.name
