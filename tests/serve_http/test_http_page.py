"""The page at `/`: in the core suite what it is made of, in the wider tier what a person sees in Chromium."""

from __future__ import annotations

import re

import pytest
from browser import Browser
from fake_engine import FakeEngine, written
from http_site import served


def test_the_page_is_one_file_that_may_run_nothing_else(server):
    reply = server.http.get("/")
    assert reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    # Nothing is fetched from anywhere: the only addresses are paths of this server.
    assert not re.search(r"https?:|//[a-z]|@import|url\(", reply.text.replace("data:,", ""))
    assert re.findall(r"\bsrc=|<link[^>]*href=\"(?!data:)", reply.text) == []
    # No markup is ever made of a model's text.
    assert "innerHTML" not in reply.text


@pytest.mark.serve
def test_two_adapters_side_by_side_in_chromium(server, tmp_path):
    """A question, both answers and the figures, as a person sees them."""
    with Browser() as page:
        page.open(server.url + "/")
        page.wait("document.querySelector('#state').textContent === 'ready'")
        names = "[...document.querySelectorAll('select')].map(s => [s.value, [...s.options].map(o => o.value).join()])"
        assert page.run(names) == [["legal", "tiny,legal,medical"], ["medical", "tiny,legal,medical"]]
        page.type("#prompt", "<b>hello</b>")
        page.type("#tokens", "9")
        page.press("#send")
        page.wait("[...document.querySelectorAll('.figures')].every(f => f.textContent.includes('length'))")
        answers = page.run("[...document.querySelectorAll('.answer')].map(a => a.textContent)")
        prompt = "user:<b>hello</b>;assistant:"
        assert answers == [written(prompt, "legal", 9), written(prompt, "medical", 9)]
        page.wait("document.querySelector('#metrics').innerText.includes('tokens a second')")
        # The figures are live: what was written shows in them within two seconds.
        page.wait("[...document.querySelectorAll('#metrics dd')].some(d => /^[0-9]+ ms$/.test(d.textContent))", 5)
        # The other endpoint, and another pair.
        page.run("document.querySelectorAll('select')[1].value = 'tiny'")
        page.press("#chat")
        page.press("#send")
        page.wait(f"document.querySelectorAll('.answer')[1].textContent === {written('<b>hello</b>', None, 9)!r}")
        page.picture(tmp_path / "page.png")
        assert page.complaints() == []
        assert {url.split("/")[2] for url in page.requested()} == {server.url.split("/")[2]}


@pytest.mark.serve
def test_what_goes_wrong_is_shown_in_chromium(tenants):
    """A key that is missing, one that may not, and an answer that is stopped."""
    tenants.engine.delay = 0.02
    with Browser() as page:
        page.open(tenants.url + "/")
        page.wait("document.querySelector('#state').textContent.includes('API key')")
        page.type("#key", tenants.secrets["alice"])
        page.run("document.querySelector('#key').dispatchEvent(new Event('change'))")
        page.wait("document.querySelector('#state').textContent === 'ready'")
        assert page.run("[...document.querySelector('select').options].map(o => o.value).join()") == "tiny,legal"
        page.type("#tokens", "4096")
        page.press("#send")
        page.wait("document.querySelector('.answer.bad') && document.querySelector('.answer').textContent")
        assert "max_tokens" in page.run("document.querySelector('.answer').textContent")
        page.wait("!document.querySelector('#send').disabled")
        page.type("#tokens", "150")
        page.press("#send")
        page.wait("document.querySelector('.answer').textContent.length > 3")
        page.press("#stop")
        page.wait("document.querySelector('.figures').textContent.includes('stopped')")
        page.wait("!document.querySelector('#send').disabled")
    assert tenants.engine.cancelled


@pytest.mark.serve
def test_the_page_before_the_server_is_ready(root):
    engine = FakeEngine()
    with served(root, engine) as site, Browser() as page:
        engine.ready = False
        page.open(site.url + "/")
        page.wait("document.querySelector('#state').textContent.includes('engine stopped')")
        engine.ready = True
        page.wait("document.querySelector('#state').textContent === 'ready'")
