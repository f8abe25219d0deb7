"""Errors as clients see them: always JSON with a code, a message and a remedy, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from lightning_rec.recommend.types import RequestError

STORE_UNAVAILABLE = "store_unavailable"
_STATUS = {
    "unknown_item": 404,
    "unknown_user": 404,
    "item_exists": 409,
    "artefact_replaced": 503,
    STORE_UNAVAILABLE: 503,
}
_AGAIN = {"Retry-After": "1"}
_BY_STATUS = {
    404: ("not_found", "There is nothing at this address.", "See /openapi.json for what there is."),
    405: ("method_not_allowed", "This address does not take this method.", "See /openapi.json for what it takes."),
}


class ServiceError(Exception):
    """Something that is told to the client as it is.

    Args:
        status: the HTTP status.
        code: a short name that programs may test.
        message: what is wrong, a whole sentence.
        remedy: what to do about it.
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, code: str, message: str, remedy: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.remedy = remedy
        self.headers = dict(headers or {})


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response. NaN and infinity, which JSON does not have, raise ValueError instead of reaching a client."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode(), status, dict(headers or {}), "application/json")


def error_body(code: str, message: str, remedy: str) -> dict[str, str]:
    """What an error looks like."""
    return {"code": code, "message": message, "remedy": remedy}


def told(error: RequestError) -> dict[str, str]:
    """A refused request, as the client sees it."""
    return error_body(error.code, str(error).removesuffix(error.remedy).strip(), error.remedy)


def replaced() -> RequestError:
    """What is told when words cannot be read, since the language model was to be loaded and is no longer there."""
    return RequestError(
        "The artefact that serves was replaced or altered before its language model was loaded.",
        "artefact_replaced",
        "Reload the service, or keep warm_up on.",
    )


def store_away() -> RequestError:
    """What one of several requests is told when the store of histories is away, full or locked."""
    return RequestError(
        "The store of histories does not answer.",
        STORE_UNAVAILABLE,
        "Come again in 1 s; the operator finds the cause in the log.",
    )


def store_unavailable() -> ServiceError:
    """The same for a whole call."""
    body = told(store_away())
    return ServiceError(503, body["code"], body["message"], body["remedy"], _AGAIN)


def items_pending() -> ServiceError:
    """What is told while the changes of items that the store has are being applied, after a start."""
    return ServiceError(
        503, "items_pending", "The changes of items that the store has are being applied.", "Come again in 1 s.", _AGAIN
    )


def of_request(error: RequestError) -> Response:
    """The response to a refused request."""
    headers = _AGAIN if error.code == STORE_UNAVAILABLE else None
    return as_json(told(error), _STATUS.get(error.code, 400), headers)


def of_service(error: ServiceError) -> Response:
    """The response to a :class:`ServiceError`."""
    return as_json(error_body(error.code, error.message, error.remedy), error.status, error.headers)


def of_status(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """The response to what was refused before an endpoint saw it; ``detail`` is told of what is no JSON."""
    code, message, remedy = _BY_STATUS.get(status, ("bad_json", detail, "NaN and Infinity are no JSON either."))
    return as_json(error_body(code, message, remedy), status, headers)


def of_failure(call: str) -> Response:
    """The response to a call on which the service failed; the log tells why under the call's number."""
    remedy = f"Tell the operator the call's number, {call}."
    return as_json(error_body("internal", "The service failed on this call.", remedy), 500)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> Response:
    """The response to a body, path or query that does not fit: every fault with its place, and nothing of the values.

    Args:
        errors: as pydantic lists them.
    """
    faults = []
    for error in errors[:10]:
        place = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "path", "one", "many"))
        if error["type"] == "extra_forbidden":
            faults.append(f"There is no field {place!r}.")
        else:
            faults.append(f"{place or 'body'}: {error['msg']}.")
    more = f" And {len(errors) - 10} more." if len(errors) > 10 else ""
    return as_json(error_body("invalid", " ".join(faults) + more, "See /openapi.json for what is expected."), 422)
