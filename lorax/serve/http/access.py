"""Who asks, and for whom: a request's key, the model that it names, and whether the one may use the other."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from lorax import serve
from lorax.serve.http.errors import ApiError
from lorax.serve.http.keys import ANYONE, Key, Keys


def caller(request: Request, keys: Keys) -> Key:
    """The entry of the key in `Authorization: Bearer ...`.

    Raises:
        ApiError: 401, no key where one is needed, or one that is not known.
    """
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    given = given.strip()
    found = keys.find(given) if kind.lower() == "bearer" and given else None
    if found is None and keys.required:
        message = "this API key is not known" if given else "an API key is needed: Authorization: Bearer KEY"
        raise ApiError(401, message, "invalid_api_key")
    found = found or ANYONE
    request.scope["state"]["notes"]["key"] = found.name
    return found


def administrator(request: Request, keys: Keys) -> Key:
    """The same for a call that changes what is served.

    Raises:
        ApiError: 401, or 403 for a key that may not.
    """
    key = caller(request, keys)
    if not key.admin:
        how = "" if keys.admins else "; set LORAX_ADMIN_KEY when the server starts, or lorax keys add --admin"
        raise ApiError(403, f"this needs an admin key{how}", "admin_key_needed")
    return key


def adapter_of(model: str, key: Key, base: str, engine: Any) -> str | None:
    """The adapter that a request's `model` names; None for the base alone.

    A key with a list gets the same answer for another tenant's adapter and for one that is not there, so it cannot
    find out which names there are.

    Raises:
        ApiError: 403 outside the key's list, 404 for a model that is not loaded.
    """
    if model == base:
        return None
    if not key.may_use(model):
        raise ApiError(403, f"this API key may not use the model {model[:128]!r}", "model_not_allowed", "model")
    try:
        return engine.adapter(model).name
    except serve.UnknownAdapter:
        message = f"the model {model[:128]!r} does not exist here; GET /v1/models lists what does"
        raise ApiError(404, message, "model_not_found", "model") from None
