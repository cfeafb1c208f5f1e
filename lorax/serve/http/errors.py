"""What goes wrong with a request, as an HTTP status and OpenAI's JSON form.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

The official clients read `message` and pick the exception's class by the status.
"""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

# status -> OpenAI's name for that kind of error
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    499: "cancelled",
    503: "service_unavailable_error",
    504: "timeout_error",
    507: "server_error",
}


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: the HTTP status.
        message: one line: the thing, the place, the way out.
        code: a word for machines, such as `model_not_found`.
        param: the field of the request that is wrong.
        retry_after: seconds after which trying again makes sense.

    Example:
        >>> ApiError(404, "the model 'x' does not exist", "model_not_found", "model").body()["error"]["type"]
        'not_found_error'
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's JSON form."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer, `Retry-After` in whole seconds included."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def invalid(param: str | None, message: str) -> ApiError:
    """A field of the request that is wrong: 400."""
    return ApiError(400, message if param is None else f"{param}: {message}", "invalid_value", param)
