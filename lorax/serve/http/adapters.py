"""`/v1/models`, and the calls that change the set: load and unload, as vLLM has them."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from lorax import serve
from lorax.serve.http.access import adapter_of, administrator, caller
from lorax.serve.http.body import read_fields
from lorax.serve.http.errors import ApiError, invalid
from lorax.serve.http.folders import NAME
from lorax.serve.http.generation import refusal
from lorax.serve.http.logs import log
from lorax.serve.http.site import Site


async def models(request: Request) -> Response:
    """The base and the adapters that the caller may use."""
    site: Site = request.app.state.site
    key = caller(request, site.keys)
    base = site.settings.base
    found = sorted((info for info in site.engine.adapters() if key.may_use(info.name)), key=lambda info: info.name)
    rows = [_base(base), *(_adapter(info, base, key.admin or not site.keys.required) for info in found)]
    return JSONResponse({"object": "list", "data": rows})


async def model(request: Request) -> Response:
    """One of them."""
    site: Site = request.app.state.site
    key, base = caller(request, site.keys), site.settings.base
    name = adapter_of(request.path_params["model"], key, base, site.engine)
    if name is None:
        return JSONResponse(_base(base))
    return JSONResponse(_adapter(site.engine.adapter(name), base, key.admin or not site.keys.required))


async def load(request: Request) -> Response:
    """Put an adapter in, or with `load_inplace` in the place of the one of its name."""
    site: Site = request.app.state.site
    administrator(request, site.keys)
    fields = await read_fields(request, site.settings)
    name, path = fields.text("lora_name"), fields.text("lora_path")
    replace = fields.flag("load_inplace")
    for ignored in ("base_model_name", "lora_int_id"):
        fields.take(ignored)
    fields.finish()
    if not NAME.fullmatch(name) or name == site.settings.base:
        raise invalid("lora_name", "must be 1 to 128 letters, digits and ._:/+- that are not the base's name")
    site.check_ready()
    try:
        folder = await asyncio.to_thread(site.folders.resolve, path)
        info = await asyncio.to_thread(site.engine.load, name, folder, replace)
    except serve.ServeError as error:
        raise refusal(error) from None
    except OSError as error:
        raise ApiError(
            503, f"lora_path: cannot be read ({error.strerror or error})", "adapter_io", "lora_path"
        ) from None
    site.forgotten.discard(name)
    log("adapter_loaded", adapter=name, rank=info.rank, bytes=info.bytes, digest=info.digest, replaced=replace)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload(request: Request) -> Response:
    """Take an adapter out. Requests that run with it end as they were."""
    site: Site = request.app.state.site
    administrator(request, site.keys)
    fields = await read_fields(request, site.settings)
    name = fields.text("lora_name")
    fields.take("lora_int_id")
    fields.finish()
    site.check_ready()
    try:
        await asyncio.to_thread(site.engine.unload, name)
    except serve.ServeError as error:
        raise refusal(error) from None
    site.forgotten.add(name)
    log("adapter_unloaded", adapter=name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _base(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "lorax", "root": name, "parent": None}


def _adapter(info: Any, base: str, whole: bool) -> dict[str, Any]:
    """A row of the list. Where an adapter lies on the server's disk is for administrators."""
    row = {"id": info.name, "object": "model", "created": int(info.loaded_at), "owned_by": "lorax", "parent": base}
    row["root"] = info.path if whole else info.name
    return {**row, "rank": info.rank, "bytes": info.bytes, "tier": info.tier, "digest": info.digest}
