"""The page's files and its rendering of Markdown, as HTTP."""

from __future__ import annotations

import re

from fastapi.testclient import TestClient

from mlx_gptoss.server import ServerSettings, create_app

pytest_plugins = ["tests.support.server_fixtures"]


def test_every_file_that_the_page_names_is_served_and_kept_by_browsers(scripted: TestClient) -> None:
    page = scripted.get("/").text
    names = set(re.findall(r'"(/static/[^"]+)"', page))
    todo = list(names)
    while todo:
        response = scripted.get(name := todo.pop())
        assert response.status_code == 200, name
        assert "http://" not in response.text.replace("http://www.w3.org/", ""), name
        again = scripted.get(name, headers={"If-None-Match": response.headers["ETag"]})
        assert again.status_code == 304 and not again.content
        imported = {f"/static/{one}" for one in re.findall(r'from "\./([^"]+)"', response.text)}
        todo += imported - names
        names |= imported
    assert len(names) > 15


def test_the_page_needs_no_key_but_what_it_asks_for_does() -> None:
    client = TestClient(create_app(None, ServerSettings(api_key="sk")), base_url="http://localhost")
    assert client.get("/").status_code == client.get("/static/main.js").status_code == 200
    body = {"texts": [{"text": "*a*"}]}
    assert client.post("/page/render", json=body).status_code == 401
    headers = {"Authorization": "Bearer sk"}
    answer = client.post("/page/render", json=body, headers=headers).json()  # no model is needed
    assert answer == {"texts": [[{"html": "<p><em>a</em></p>\n", "lines": 1}]]}


def test_a_growing_text_has_an_open_end(scripted: TestClient) -> None:
    texts = [{"text": "# a\n\nb", "name": "x", "growing": True}, {"text": ""}]
    grown, empty = scripted.post("/page/render", json={"texts": texts}).json()["texts"]
    assert [block["lines"] for block in grown] == [None, None] or [b["lines"] for b in grown] == [2, None]
    assert empty == []


def test_what_is_too_much_is_refused(scripted: TestClient) -> None:
    for texts in ([{"text": "x" * 1_000_001}], [{"text": "x"}] * 51, [{"text": "x", "name": "y" * 81}]):
        assert scripted.post("/page/render", json={"texts": texts}).status_code == 400
    assert scripted.get("/static/routes.py").status_code == 404
