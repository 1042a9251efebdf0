"""The macOS sandbox profile, as far as its text can be checked anywhere. `selftest` tries it on a Mac."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from mlx_gptoss.tools.sandbox import profile_macos
from mlx_gptoss.tools.sandbox.paths import SYSTEM

# Operations and filters of the profile language that are used, as Chromium's and Apple's own profiles do.
OPERATIONS = {
    *("default", "signal", "process-info*", "sysctl-read", "ipc-posix-shm-read-data"),
    *("file-read*", "file-read-metadata", "file-map-executable", "file-write-data", "file-write-create"),
    *("file-write-flags", "file-write-mode", "file-write-times", "file-write-unlink"),
}
FILTERS = {"literal", "subpath", "target", "sysctl-name", "sysctl-name-prefix", "ipc-posix-name"}

Form = list["Form | str"]


def parse(text: str) -> list[Form]:
    """The profile's forms. Raises AssertionError for what is not one."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()"]+', text)
    assert "".join(tokens) == re.sub(r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", text)
    stack: list[Form] = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            assert len(stack) > 1, "a parenthesis too many"
            form = stack.pop()
            stack[-1].append(form)
        else:
            stack[-1].append(token)
    assert len(stack) == 1, "a parenthesis too few"
    return [form for form in stack[0] if isinstance(form, list)]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return os.path.realpath(tmp_path)


def test_it_denies_by_default_and_allows_by_known_names(folder: str) -> None:
    first, second, *rest = parse(profile_macos.profile(folder, ["/usr/lib", "/System/Library"]))
    assert first == ["version", "1"]
    assert second == ["deny", "default"]
    for rule in rest:
        assert rule[0] == "allow"
        operations = [part for part in rule[1:] if isinstance(part, str)]
        filters = [part[0] for part in rule[1:] if isinstance(part, list)]
        assert operations and set(operations) <= OPERATIONS
        assert filters and set(map(str, filters)) <= FILTERS, "nothing is allowed without saying on what"


def test_no_network_no_processes_no_services(folder: str) -> None:
    allowed = {
        part
        for rule in parse(profile_macos.profile(folder, ["/usr/lib"]))
        for part in rule[1:]
        if isinstance(part, str)
    }
    for kind in ("network", "process-fork", "process-exec", "mach-", "iokit", "appleevent", "lsopen"):
        assert not [operation for operation in allowed if operation.startswith(kind)]


def rules(text: str, operation: str) -> set[str]:
    """The filters under which an operation is allowed."""
    found = set()
    for rule in parse(text):
        if operation in rule:
            found |= {f"{part[0]} {part[1]}" for part in rule if isinstance(part, list)}
    return found


def test_only_the_folder_is_written(folder: str) -> None:
    text = profile_macos.profile(folder, ["/usr/lib"])
    assert rules(text, "file-write-create") == {f'subpath "{folder}"'}
    assert rules(text, "file-write-data") == {f'subpath "{folder}"', 'literal "/dev/null"'}
    assert rules(text, "file-map-executable") == {'subpath "/usr/lib"'}


def test_the_users_own_folders_are_not_readable() -> None:
    """/System would hold them too, under /System/Volumes/Data."""
    for path in SYSTEM["darwin"]:
        for private in ("/Users/x", "/System/Volumes/Data/Users/x", "/private/var/folders", "/private/tmp"):
            assert not f"{private}/".startswith(f"{path}/")


def test_links_on_the_way_to_a_readable_path_can_be_followed(folder: str, tmp_path: Path) -> None:
    (tmp_path / "real" / "lib").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    text = profile_macos.profile("/private/x", [f"{folder}/link/lib"])
    assert f'subpath "{folder}/real/lib"' in rules(text, "file-map-executable")
    assert f'literal "{folder}/link"' in rules(text, "file-read-metadata")


def test_quotes_in_paths_do_not_end_the_string() -> None:
    text = profile_macos.profile('/private/tmp/a "b\\"', ["/usr/lib"])
    assert r'subpath "/private/tmp/a \"b\\\""' in rules(text, "file-write-create")
    with pytest.raises(OSError, match="control characters"):
        profile_macos.profile("/private/tmp/a\nb", ["/usr/lib"])
