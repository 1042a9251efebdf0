"""What `serve` says and opens when its port is open."""

from __future__ import annotations

import webbrowser

import pytest

from mlx_gptoss.cli.invitation import announce, code, invitation, reachable


def test_the_key_is_in_the_fragment_and_nowhere_else() -> None:
    assert invitation("http://10.0.0.2:8000", "s k/?#") == "http://10.0.0.2:8000/#key=s%20k%2F%3F%23"
    assert invitation("http://10.0.0.2:8000", None) == "http://10.0.0.2:8000"


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://192.168.1.5:80", "http://[::1]:8000"])
def test_an_address_of_its_own_stays(url: str) -> None:
    assert reachable(url) == url


def test_all_addresses_become_one_that_others_can_use() -> None:
    address = reachable("http://0.0.0.0:8123")
    assert address.startswith("http://") and address.endswith(":8123") and "0.0.0.0" not in address


def test_the_page_is_opened_if_asked_and_a_log_has_no_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    announce("http://0.0.0.0:8000", "sk-secret", open_page=True)
    announce("http://127.0.0.1:8001", None, open_page=False)
    said = capsys.readouterr().err
    assert opened == ["http://127.0.0.1:8000"]
    assert "listening on http://127.0.0.1:8001" in said
    assert "secret" not in said and "█" not in said


def test_a_code_is_square_and_has_a_margin() -> None:
    lines = code("http://10.0.0.2:8000").splitlines()
    assert len(lines) > 10
    assert len({len(line) for line in lines if line.strip()}) <= 2
