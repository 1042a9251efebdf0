"""What `serve` finds out before it loads anything."""

from __future__ import annotations

import socket

import pytest

from mlx_gptoss.cli import run


def test_a_taken_port_names_the_option_before_the_model_is_looked_at(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", "/no/such/folder", "--port", str(port)]) == 1
    err = capsys.readouterr().err
    assert err == (
        f"error: port {port} of 127.0.0.1 is taken by another program: choose another one with --port, "
        "or --port 0 for a free one\n"
    )


def test_an_address_of_another_machine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "demo", "--host", "192.0.2.1", "--no-auth"]) == 1
    assert "192.0.2.1:8000 cannot be used" in capsys.readouterr().err
