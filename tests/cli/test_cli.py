"""The commands generate and inspect as a person runs them, and the one line each mistake ends in."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import mlx_gptoss
from mlx_gptoss.cli import COMMANDS, cli, run
from mlx_gptoss.cli.options import ModelSource, model_options, sampling_options, size
from mlx_gptoss.engine.options import EngineOptions
from mlx_gptoss.sampling import SamplingParams
from mlx_gptoss.tokenizer import Tokenizer
from tests.conftest import TINY
from tests.support.checkpoints import write_checkpoint
from tests.support.random_weights import SHAPES
from tests.support.sparse_checkpoint import write_sparse

CLI = [sys.executable, "-m", "mlx_gptoss"]
GREEDY = ["--temperature", "0"]


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the command line in this process, with nothing on standard input: exit status, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        status = run([str(a) for a in args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


# ------------------------------------------------------------------------------------------- the group


def test_help_names_every_command_and_imports_none() -> None:
    code = (
        "import sys; from mlx_gptoss.cli import run; assert run(['--help']) == 0; "
        "print(*(m for m in sys.modules if m.startswith(('mlx_gptoss.cli.', 'mlx.', 'rich', 'numpy'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *page, modules = done.stdout.splitlines()
    assert modules.strip() == ""
    for name, line in COMMANDS.items():
        assert any(row.split() == [name, *line.split()] for row in page), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(command: Command, name: str) -> None:
    status, out, err = command(name, "--help")
    assert (status, err) == (0, "")
    assert f"mlx-gptoss {name}" in out
    loaded = cli.get_command(None, name)  # type: ignore[arg-type]
    assert loaded is not None and loaded.help


def test_an_unknown_command_is_a_usage_error(command: Command) -> None:
    status, _, err = command("frobnicate")
    assert status == 2 and err == "error: no such command 'frobnicate' (see `mlx-gptoss --help`)\n"


def test_sampling_options_default_to_the_librarys() -> None:
    received: list[SamplingParams] = []

    @click.command()
    @sampling_options()
    def anything(sampling: SamplingParams) -> None:
        received.append(sampling)

    anything.main([], standalone_mode=False)
    assert received[0] == SamplingParams()


def test_every_sampling_option_sets_its_field() -> None:
    received: list[SamplingParams] = []

    @click.command()
    @sampling_options()
    def anything(sampling: SamplingParams) -> None:
        received.append(sampling)

    wanted: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 2.0,
        "seed": 7,
        "max_tokens": 9,
    }
    words = [word for name, value in wanted.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    anything.main([*words, "--stop", "a", "--stop", "b"], standalone_mode=False)
    assert received[0] == SamplingParams(**wanted, stop=("a", "b"))


def test_every_loading_option_reaches_the_engine_by_its_name() -> None:
    received: list[ModelSource] = []

    @click.command()
    @model_options
    def anything(source: ModelSource) -> None:
        received.append(source)

    line = "m --dtype float16 --revision v1 --offline --max-context 100 --kv-budget 1KiB --kv-bits 8"
    anything.main([*line.split(), "--prefix-cache", "kept", "--draft", "lookup"], standalone_mode=False)
    source = received[0]
    assert (source.model, source.dtype, source.revision, source.offline) == ("m", "float16", "v1", True)
    assert EngineOptions(**source.engine) == EngineOptions(
        max_context=100, kv_budget=1024, kv_bits=8, prefix_cache=Path("kept"), draft="lookup"
    )


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4 * 10**9), ("1.5 gib", 3 * 2**29), ("512MiB", 2**29), ("1000", 1000)]
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert size(text) == count


# -------------------------------------------------------------------------------------------- generate


def test_generate_streams_what_the_engine_generates(command: Command, text_folder: Path) -> None:
    status, out, err = command("generate", text_folder, "--raw", "-p", "Hello", "--max-tokens", 24, *GREEDY)
    assert status == 0
    tokenizer = Tokenizer.from_folder(text_folder)
    params = SamplingParams(temperature=0.0, max_tokens=24)
    with mlx_gptoss.load(text_folder) as llm:
        expected = [t for t in llm.generate(tokenizer.encode("Hello"), params) if t not in tokenizer.stop_ids]
    assert out == tokenizer.decode(expected) + "\n"
    assert re.fullmatch(
        r"prompt: 5 tokens at [\d.]+ tokens/s; output: \d+ tokens at [\d.]+ tokens/s; "
        r"first after [\d.]+ s, peak memory [\d.]+ GB\n",
        err,
    )


def test_generate_as_json_is_one_object_with_the_same_tokens(command: Command, text_folder: Path) -> None:
    args = ["generate", text_folder, "--raw", "-p", "Hello", "--max-tokens", 12, "--seed", 7]
    _, text, _ = command(*args)
    status, out, err = command(*args, "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert report["text"] + "\n" == text
    assert report["completion_tokens"] == len(report["tokens"]) <= 12
    assert report["prompt_tokens"] == 5 and report["finish_reason"] in ("length", "stop")
    assert report["time_to_first_token"] > 0 and report["peak_memory"] > 0


def test_token_ids_need_no_tokenizer(command: Command, bare_folder: Path, text_folder: Path) -> None:
    """The same weights, with ids in and out."""
    _, ids, _ = command("generate", bare_folder, "--tokens", "1, 2 3", "--max-tokens", 8, *GREEDY)
    _, report, _ = command("generate", text_folder, "--tokens", "1 2 3", "--max-tokens", 8, *GREEDY, "--json")
    assert [int(t) for t in ids.split()] == json.loads(report)["tokens"]


def test_the_same_seed_gives_the_same_text_and_another_does_not(command: Command, bare_folder: Path) -> None:
    seeds = [11, 11, 12]
    outs = [
        command("generate", bare_folder, "--tokens", "5", "--max-tokens", 16, "--seed", s)[1] for s in seeds
    ]
    assert outs[0] == outs[1] != outs[2]


def test_a_stop_text_ends_the_output_before_it(command: Command, text_folder: Path) -> None:
    args = ["generate", text_folder, "--raw", "-p", "Hello", "--max-tokens", 24, *GREEDY]
    whole = command(*args)[1].rstrip("\n")
    stop = whole[3:5]
    assert command(*args, "--stop", stop)[1] == whole[: whole.index(stop)] + "\n"


def test_the_prompt_may_come_from_standard_input(text_folder: Path) -> None:
    args = [*CLI, "generate", str(text_folder), "--raw", "--max-tokens", "4", *GREEDY, "--json"]
    piped = subprocess.run(args, input="Hello", capture_output=True, text=True, check=True)
    given = subprocess.run([*args, "-p", "lo"], input="Hel", capture_output=True, text=True, check=True)
    assert json.loads(piped.stdout)["tokens"] == json.loads(given.stdout)["tokens"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "printf 'abc\\377' | PYTHONUTF8=1 PYTHONIOENCODING=utf-8:strict $CLI generate {0}",
            "standard input",
        ),
        ("printf 'abc\\377' | PYTHONIOENCODING=utf-8:surrogateescape $CLI generate {0}", "the prompt"),
        ("""$CLI generate {0} -p "$(printf 'abc\\377')" """, "the prompt"),
        ("""$CLI generate {0} --raw -p "$(printf 'abc\\377')" """, "the prompt"),
    ],
)
def test_a_prompt_that_is_not_utf_8_is_one_line_before_the_model_is_looked_at(line: str, told: str) -> None:
    done = shell(line.format("/no/such/folder"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert told in done.stderr and "position 3" in done.stderr


def test_ctrl_c_ends_cleanly(bare_folder: Path) -> None:
    args = [*CLI, "generate", str(bare_folder), "--tokens", "1", "--max-tokens", "100000"]
    args += ["--max-context", "120000"]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "", out


def test_a_closed_pipe_is_no_traceback(bare_folder: Path) -> None:
    line = f"{sys.executable} -m mlx_gptoss generate {bare_folder} --tokens 1 --max-tokens 2000 | head -c 5"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)
    assert len(done.stdout) == 5 and "Traceback" not in done.stderr


def shell(line: str) -> subprocess.CompletedProcess[str]:
    """Run a shell line in which $CLI is the command."""
    line = line.replace("$CLI", " ".join(CLI))
    return subprocess.run(
        ["sh", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "what", ["inspect {0} --json", "inspect {0}", "generate {0} --tokens 1 --max-tokens 3"]
)
def test_output_that_cannot_be_written_is_one_line(bare_folder: Path, what: str) -> None:
    done = shell(f"$CLI {what.format(bare_folder)} > /dev/full")
    assert (done.returncode, done.stderr) == (1, "error: output: No space left on device\n")


@pytest.mark.parametrize(
    "what",
    [
        "inspect {0} --json",
        "inspect {0}",
        "generate {0} -p Hello --max-tokens 3 --raw",
        "generate {0} -p Hello --max-tokens 3",
    ],
)
def test_a_closed_standard_output_is_output_thrown_away(text_folder: Path, what: str) -> None:
    done = shell(f"$CLI {what.format(text_folder)} >&-")
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_closed_standard_input_is_an_empty_prompt(text_folder: Path) -> None:
    done = shell(f"$CLI generate {text_folder} <&-")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the prompt is empty") and done.stderr.count("\n") == 1


def test_a_prefix_cache_that_cannot_be_made_is_one_line(
    command: Command, bare_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    line = only_line(command("generate", bare_folder, "--tokens", 1, "--prefix-cache", tmp_path / "file/in"))
    assert str(tmp_path / "file/in") in line and "Not a directory" in line


# --------------------------------------------------------------------------------------------- inspect


def test_inspect_tells_sizes_and_fit(command: Command, tmp_path: Path) -> None:
    folder = write_sparse(tmp_path, SHAPES["20b"])
    status, out, err = command("inspect", folder, "--dtype", "bfloat16", "--json")
    report = json.loads(out)
    assert (status, err, report["layout"]) == (0, "", "hf")
    assert report["bytes"]["stored"] == 13_761_264_768
    assert report["architecture"]["num_experts"] == 32
    assert [c["tokens"] for c in report["contexts"]] == [4096, 32_768, 131_072]
    free = report["machine"]["free"]
    assert all(c["fits"] == (c["total"] <= free) for c in report["contexts"])
    status, page, _ = command("inspect", folder, "--dtype", "bfloat16")
    assert status == 0
    for fact in ("24 layers", "13.76 GB", "mxfp4", "131,072", "3.7"):
        assert fact in page


def test_inspect_plans_a_model_over_macs_of_given_memory(command: Command, tmp_path: Path) -> None:
    folder = write_sparse(tmp_path, SHAPES["120b"])
    words = ("inspect", folder, "--dtype", "bfloat16", "--hosts", "64GB,48GB")
    status, out, err = command(*words, "--json")
    shares = json.loads(out)["hosts"]
    assert (status, err) == (0, "")
    assert [share["layers"][1] for share in shares][-1] == 36
    assert shares[0]["layers"][1] == shares[1]["layers"][0] > 18  # the larger Mac has more
    assert [share["room"] for share in shares] == [48 * 2**30, 36 * 2**30]
    status, page, _ = command(*words, "--split", "16,20")
    assert status == 0 and "0-15 (16)" in page and "16-35 (20)" in page
    status, page, _ = command(*words, "--parallel", "tensor")
    assert status == 0 and "KV heads" in page and "0-3 (4)" in page and "0-35" not in page


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hosts", "48GB,much GB"], "hosts: 'much GB' is no host"),
        (["--hosts", "localhost"], "1 host; expected two or more"),
        (["--hosts", "48GB,48GB", "--split", "4"], "split is 4: expected 2 counts above 0"),
        (["--hosts", "48GB,48GB", "--split", "x"], "split is 'x': expected a count for each machine"),
        (["--hosts", "1GB,48GB", "--split", "3,1"], "a Mac with 1 GB: 3 layers need"),
    ],
)
def test_a_plan_that_is_asked_for_wrongly_is_one_line(
    command: Command, options: list[str], told: str
) -> None:
    assert told in only_line(command("inspect", "demo", *options))


# ------------------------------------------------------------------------------------------- bad input


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a safetensors header in place of the old one, leaving the data as they are."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[new] = header.pop(old)

    return change


def misshape(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["shape"] = [64, 3]


def poison_scales(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + size])["model.layers.1.mlp.experts.down_proj_scales"]
    raw[8 + size + entry["data_offsets"][0] + 5] = 255
    path.write_bytes(bytes(raw))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def point_outside(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    "another model": (lambda f: edit_config(f, model_type="llama"), "model_type is 'llama'"),
    "field missing": (lambda f: edit_config(f, head_dim=None), "head_dim is missing"),
    "config contradicts tensors": (lambda f: edit_config(f, num_local_experts=16), "expected [16, "),
    "config contradicts itself": (lambda f: edit_config(f, num_hidden_layers=3), "layer_types"),
    "tensor missing and one extra": (
        lambda f: edit_header(f / "model.safetensors", rename("lm_head.weight", "lm_hat.weight")),
        "2 problems: lm_head.weight is missing; lm_hat.weight is not part of the model",
    ),
    "misshapen": (
        lambda f: edit_header(f / "model.safetensors", misshape),
        "model.norm.weight has shape [64, 3]",
    ),
    "truncated": (truncate, "model.safetensors"),
    "no safetensors at all": (lambda f: (f / "model.safetensors").write_bytes(b"{" * 64), "safetensors"),
    "weights are gone": (lambda f: (f / "model.safetensors").unlink(), "no safetensors files"),
    "index points outside": (point_outside, "points outside the folder"),
    "NaN scale": (poison_scales, "model.layers.1.mlp.experts.down_proj_scales: holds the scale byte 255"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole"), TINY, shards=1)


def only_line(result: tuple[int, str, str]) -> str:
    """The one line on stderr of a run that failed as it should."""
    status, out, err = result
    assert (status, out) == (1, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_one_line(command: Command, whole: Path, tmp_path: Path, what: str) -> None:
    damage, expected = DAMAGE[what]
    folder = shutil.copytree(whole, tmp_path / "copy")
    damage(folder)
    assert expected in only_line(command("generate", folder, "--tokens", "1"))


def test_many_missing_tensors_are_counted_and_ten_are_named(
    command: Command, whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    edit_config(folder, num_hidden_layers=4, layer_types=None)
    line = only_line(command("generate", folder, "--tokens", "1"))
    assert line.count("is missing") == 10
    assert re.search(r"\d\d problems: .* and \d+ more\n", line)


REQUESTS: dict[str, tuple[list[str], str]] = {
    "temperature below 0": (["--tokens", "1", "--temperature", "-0.5"], "temperature is -0.5"),
    "top-p of 0": (["--tokens", "1", "--top-p", "0"], "top_p is 0"),
    "top-p above 1": (["--tokens", "1", "--top-p", "1.5"], "top_p is 1.5"),
    "unknown token": (["--tokens", "1 99999"], "token_ids[1] is 99999: the vocabulary has ids 0 to 319"),
    "ids that are none": (["--tokens", "1 x"], "--tokens has 'x'"),
    "negative id": (["--tokens=-1"], "--tokens has '-1'"),
    "no ids": (["--tokens", ""], "--tokens has ''"),
    "empty prompt": (["-p", ""], "the prompt is empty"),
    "prompt too long": (
        ["--tokens", "1 " * 100, "--max-context", "80"],
        "100 tokens and the context holds 80",
    ),
    "no tokenizer": (["-p", "Hello"], "no tokenizer.json"),
    "no tokens wanted": (["--tokens", "1", "--max-tokens", "0"], "max_tokens is 0"),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_that_cannot_be_met_is_one_line(command: Command, bare_folder: Path, what: str) -> None:
    options, expected = REQUESTS[what]
    assert expected in only_line(command("generate", bare_folder, *options))


@pytest.mark.parametrize(
    "content", ["{", "[]", "[" * 100_000, '{"eos_token_id": "2"}', '{"eos_token_id": [1, 2.5]}', "\xff"]
)
def test_stop_ids_that_cannot_be_read_are_one_line_before_loading(
    command: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "generation_config.json").write_text(content, encoding="latin-1")
    monkeypatch.setattr("mlx_gptoss.llm.read_model", lambda *_: pytest.fail("the weights were read"))
    assert "generation_config.json" in only_line(command("generate", folder, "--tokens", "1"))


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "9" * 9000])
def test_a_schema_that_is_not_json_is_one_line(
    command: Command, text_folder: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "schema.json").write_text(content)
    line = only_line(command("generate", text_folder, "-p", "x", "--schema", tmp_path / "schema.json"))
    assert "is not JSON" in line


@pytest.mark.parametrize("model", ["/no/such/folder", "not a model", ""])
def test_a_model_that_is_nowhere_is_one_line(command: Command, model: str) -> None:
    assert "expected an existing folder" in only_line(command("inspect", model))


@pytest.mark.parametrize("words", [["inspect"], ["convert"], ["verify"], ["generate", "--tokens", "1"]])
def test_a_name_longer_than_a_file_name_may_be_is_one_line(command: Command, words: list[str]) -> None:
    assert "File name too long" in only_line(command(*words, "a" * 300))


def test_too_little_memory_is_said_before_loading(
    command: Command, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_gptoss.llm.available_memory", lambda: 100_000_000)
    line = only_line(command("generate", whole, "--tokens", "1"))
    assert re.search(r"needs [\d.]+ [MG]B .* and 0\.10 GB are free", line)


def test_two_prompts_are_a_usage_error(command: Command, bare_folder: Path) -> None:
    status, out, err = command("generate", bare_folder, "-p", "a", "--tokens", "1")
    assert (status, out) == (2, "") and "not both" in err


# ------------------------------------------------------------------------------------- usage and standing


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chat"], "missing argument 'MODEL'. Give a folder, a Hub id, 20b, 120b or demo"),
        (["pull"], "missing argument 'MODEL'. Give 20b, 120b or a Hub id"),
        (
            ["chat", "demo", "--efort", "low"],
            "no such option '--efort'. (Did you mean one of: '--effort', '--force'?)",
        ),
        (["chat", "demo", "--effort", "huge"], "invalid value for '--effort': 'huge' is not one of"),
        (["generate", "demo", "--max-tokens", "x"], "'x' is not a valid integer"),
        (["serve", "demo", "--kv-budget", "4XB"], "expected a size such as 4GB"),
    ],
)
def test_usage_errors_are_one_line_like_all_others(command: Command, words: list[str], told: str) -> None:
    status, out, err = command(*words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and told in err
    assert f"see `mlx-gptoss {words[0]} --help`" in err


def test_a_revision_of_what_is_on_this_disk_is_told(command: Command, bare_folder: Path) -> None:
    for model in (bare_folder, "demo"):
        assert "only a model of the Hub has revisions" in only_line(
            command("inspect", model, "--revision", "main")
        )


def test_help_comes_quickly() -> None:
    """What takes time is to import: 54 modules more than Python itself, where `generate --help` has 167."""

    def imported(*args: str) -> int:
        command = [sys.executable, "-X", "importtime", *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stderr.count("import time:")

    assert imported("-m", "mlx_gptoss", "--help") - imported("-c", "pass") < 100
