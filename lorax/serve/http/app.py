"""The application: which path is which handler.

GET  /                          the page
GET  /health  /ready            for machines that watch
GET  /metrics                   Prometheus
GET  /v1/models  /v1/models/M   POST /v1/completions  /v1/chat/completions
POST /v1/load_lora_adapter      POST /v1/unload_lora_adapter
"""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lorax.serve.http import adapters, completions, page
from lorax.serve.http.access import caller
from lorax.serve.http.errors import ApiError
from lorax.serve.http.guard import Guard
from lorax.serve.http.site import Site

ROUTES = (
    ("/", "GET", page.page),
    ("/v1/models", "GET", adapters.models),
    ("/v1/models/{model:path}", "GET", adapters.model),
    ("/v1/completions", "POST", completions.completions),
    ("/v1/chat/completions", "POST", completions.chat),
    ("/v1/load_lora_adapter", "POST", adapters.load),
    ("/v1/unload_lora_adapter", "POST", adapters.unload),
)


def create_app(site: Site) -> Any:
    """The ASGI application of a site.

    Args:
        site: the engine and what surrounds it.
    """
    routes = [Route(path, handler, methods=[method]) for path, method, handler in ROUTES]
    routes += [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    app.state.site = site
    site.metrics.know(frozenset(route.path for route in routes))
    return Guard(app, site.settings, site.metrics.count)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _failure(request: Request, error: Exception) -> Response:
    """A fault of the server's own; the guard writes it to the log under this number."""
    number = request.scope["state"]["notes"]["id"]
    return ApiError(500, f"an internal error; the server's log has it under {number}", "internal_error").response()


async def health(request: Request) -> Response:
    """Whether this process is alive: 503 once its engine has failed."""
    site: Site = request.app.state.site
    return JSONResponse({"status": "failed" if site.failed else "ok"}, 503 if site.failed else 200)


async def ready(request: Request) -> Response:
    """Whether requests are answered."""
    site: Site = request.app.state.site
    if site.ready:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not ready", "reason": site.why_not()}, 503, {"Retry-After": "2"})


async def metrics(request: Request) -> Response:
    """Figures, in the text format of Prometheus."""
    site: Site = request.app.state.site
    key = caller(request, site.keys)
    return Response(site.metrics.text(key), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:200]}"
    said = {404: f"{where}: there is no such path", 405: f"{where}: another method is needed here"}
    found = ApiError(error.status_code, said.get(error.status_code, str(error.detail)), "http_error").response()
    found.headers.update(error.headers or {})
    return found


HANDLERS: Any = {ApiError: _api_error, HTTPException: _http_error, Exception: _failure}
