"""The chat page at /: one static file that may run its own script and talk to this server, nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response


def content_security_policy(page: str) -> str:
    """A policy under which exactly the page's inline scripts and styles run."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()) for block in blocks)
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def router() -> APIRouter:
    """The page's route."""
    routes = APIRouter(include_in_schema=False)
    page = files("mlx_gptoss.server").joinpath("static/index.html").read_text("utf-8")
    headers = {"Content-Security-Policy": content_security_policy(page), "Cache-Control": "no-cache"}

    @routes.get("/")
    async def chat_page() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @routes.get("/favicon.ico")
    async def favicon() -> Response:
        return Response(status_code=204)

    return routes
