"""The package's surface: public names, what importing it costs, and what an installation contains."""

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mlx_gptoss
from mlx_gptoss.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
PUBLIC = [
    "BatchError",
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthError",
    "Conversation",
    "ConversionError",
    "Diagnostic",
    "Done",
    "Event",
    "GptOssError",
    "HostError",
    "HubError",
    "LLM",
    "McpTools",
    "MemoryLimitError",
    "Message",
    "MessageDone",
    "ModelNotFoundError",
    "PreambleDelta",
    "PromptProgress",
    "ReasoningDelta",
    "Reply",
    "RequestError",
    "SamplingParams",
    "SchemaError",
    "Session",
    "TextDelta",
    "TokenLogprobs",
    "TokenizerError",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolError",
    "Usage",
    "VerificationError",
    "load",
    "mcp_tools",
]

HEAVY = {"mlx", "mlx_lm", "transformers", "torch", "fastapi", "uvicorn", "rich", "numpy", "tokenizers"}


def test_public_names_are_pinned() -> None:
    assert sorted(mlx_gptoss.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(mlx_gptoss))


# What a room offers as a whole; of the others the modules are imported by name.
EXPORTS = {
    "mlx_gptoss.cli": ["COMMANDS", "cli", "main", "run"],
    "mlx_gptoss.doctor": ["Finding", "Verdict", "examine"],
    "mlx_gptoss.server": ["ServerSettings", "create_app"],
    "mlx_gptoss.tools": ["BUILTIN", "BuiltinTool", "builtin_tools"],
    "mlx_gptoss.tune": ["TuneOptions", "tune"],
}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_exports(package: str) -> None:
    module = importlib.import_module(package)
    named = {"mlx_gptoss", "mlx_gptoss.grammar", "mlx_gptoss.harmony"}  # pinned above, or long
    if package in named:
        assert len(set(module.__all__)) == len(module.__all__) > 5
    else:
        assert module.__all__ == EXPORTS.get(package, [])
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_to_something_documented(name: str) -> None:
    assert getattr(mlx_gptoss, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mlx_gptoss.nonsense


# The commands' modules are imported for their own --help; most draw with rich.
@pytest.mark.parametrize(
    "module",
    [
        "mlx_gptoss",
        "mlx_gptoss.cli",
        "mlx_gptoss.convert.recipes",
        *(f"mlx_gptoss.cli.{c}" for c in COMMANDS),
    ],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{n.partition('.')[0] for n in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    drawn = {"rich"} if module.startswith("mlx_gptoss.cli.") else set()
    assert not (HEAVY - drawn) & set(done.stdout.split())


def test_every_package_folder_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(f.parent.relative_to(ROOT).parts)
        for top in ("mlx_gptoss", "convert")
        for f in (ROOT / top).rglob("__init__.py")
    }
    assert listed == {f"mlx_gptoss.{p}" if p.startswith("convert") else p for p in found}


def test_the_version_is_said_in_pyproject_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == mlx_gptoss.__version__
    sources = [path for top in ("mlx_gptoss", "convert") for path in (ROOT / top).rglob("*.py")]
    assert not [p for p in sources if f'"{project["version"]}"' in p.read_text(encoding="utf-8")]


def test_every_lookup_of_the_installation_uses_its_name() -> None:
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    lookup = re.compile(r"""(?:\bversion\(|package_name=|pip install )['"]?([\w-]*gptoss[\w-]*)""")
    folders = [ROOT / top for top in ("mlx_gptoss", "convert", "docs", "demo")]
    texts = [
        p.read_text(encoding="utf-8") for f in folders for p in f.rglob("*.*") if p.suffix in {".py", ".md"}
    ]
    asked = [found for text in texts for found in lookup.findall(text)]
    assert len(asked) > 4 and set(asked) == {name}
