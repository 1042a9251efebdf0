"""What `serve` says when its port is open: the address, and a code that a phone's camera can read."""

from __future__ import annotations

import ipaddress
import socket
import sys
import webbrowser
from io import StringIO
from urllib.parse import quote, urlsplit

import click
import segno


def announce(url: str, api_key: str | None, *, open_page: bool) -> None:
    """Print a server's address, with a code where others can reach it; open the page in the browser if asked.

    The code, which has the key, is shown on a terminal alone, so that no log keeps it.
    """
    click.echo(f"listening on {url}", err=True)
    address = reachable(url)
    if address != url:
        click.echo(f"in this network: {address}", err=True)
    if not _is_loopback(address) and sys.stderr.isatty():
        click.echo(code(invitation(address, api_key)), err=True)
    if open_page:
        webbrowser.open(url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:"))


def invitation(address: str, api_key: str | None) -> str:
    """The page's address with the key in the fragment, which browsers send to nobody."""
    return f"{address}/#key={quote(api_key, safe='')}" if api_key else address


def reachable(url: str) -> str:
    """The address for others in the network, where the server listens on all of this machine's."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    if not ipaddress.ip_address(parts.hostname).is_unspecified:
        return url
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it chooses the interface
            host = probe.getsockname()[0]
        except OSError:  # there is no network
            host = "127.0.0.1"
    return f"http://{host}:{parts.port}"


def code(text: str) -> str:
    """A QR code in block characters."""
    out = StringIO()
    segno.make(text, micro=False).terminal(out, compact=True)
    return out.getvalue()


def _is_loopback(url: str) -> bool:
    return ipaddress.ip_address(urlsplit(url).hostname or "").is_loopback
