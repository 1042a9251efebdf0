"""GET / and /static/{name}: the chat page's own files. POST /page/render: Markdown as HTML for it.

The page may run its own modules and talk to this server, nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from mlx_gptoss.markdown.worker import Renderer, Text
from mlx_gptoss.server.http.errors import ApiError

MEDIA_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "webmanifest": "application/manifest+json",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "manifest-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types rendered",  # one module of the page may make HTML of a text
    )
)
PAGE = "index.html"
NO_CACHE = {"Cache-Control": "no-cache"}


class RenderText(BaseModel):
    """A Markdown text. name: which of a page's it is; growing: whether more of it will come."""

    text: Annotated[str, Field(max_length=1_000_000)]
    name: Annotated[str, Field(max_length=80)] = "0"
    growing: bool = False


class RenderRequest(BaseModel):
    """What the page wants as HTML."""

    texts: Annotated[list[RenderText], Field(max_length=50)]


class _File:
    """A static file, with what lets a browser keep it."""

    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._media_type = MEDIA_TYPES[name.rpartition(".")[2]]
        self._headers = NO_CACHE | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
        if name == PAGE:
            self._headers["Content-Security-Policy"] = POLICY

    def response(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, media_type=self._media_type, headers=self._headers)


def router() -> APIRouter:
    """The page's routes."""
    routes = APIRouter(include_in_schema=False)
    folder = files("mlx_gptoss.server").joinpath("static")
    static = {file.name: _File(file.name, file.read_bytes()) for file in folder.iterdir()}
    page = static.pop(PAGE)
    renderer = Renderer()

    @routes.get("/")
    async def chat_page(request: Request) -> Response:
        return page.response(request)

    @routes.get("/static/{name}")
    async def static_file(name: str, request: Request) -> Response:
        if name not in static:
            raise ApiError(404, f"The page has no file {name[:80]!r}.", code="not_found")
        return static[name].response(request)

    @routes.get("/favicon.ico")
    async def favicon() -> Response:
        return Response(status_code=204)

    @routes.post("/page/render")
    async def render(body: RenderRequest) -> dict[str, Any]:
        """The blocks of each text: {"html", "lines"}, see `markdown.document.Block`."""
        texts = [Text(one.text, one.name, one.growing) for one in body.texts]
        rendered = await asyncio.to_thread(renderer.render, texts)
        return {"texts": [[vars(block) for block in blocks] for blocks in rendered]}

    return routes
