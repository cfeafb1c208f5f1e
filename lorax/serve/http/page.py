"""The page at `/`: one file, no outside asset, and a policy that lets nothing else run in it."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response


async def page(request: Request) -> Response:
    """Two adapters side by side, and the server's figures."""
    body, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(body, media_type="text/html; charset=utf-8", headers=headers)


@functools.cache
def _page() -> tuple[bytes, str]:
    """The file, and a policy with the digests of its own script and style: no others run, and none is fetched."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script, style = (_digest(text, tag) for tag in ("script", "style"))
    policy = f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:"
    return text.encode(), f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _digest(text: str, tag: str) -> str:
    (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
