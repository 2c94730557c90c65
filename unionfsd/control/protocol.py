"""JSON-RPC 2.0 (https://www.jsonrpc.org/specification) as it is spoken on the control socket: what may be said.

Rules this file obeys:

- Pure: bytes in, values out. A frame is one JSON text on one line.
- What a peer sends is bounded in size, depth and number before anybody looks at its meaning, and whatever it is, the
  answer is a value of this file: nothing here raises anything but `RpcError`.
- A name that is no UTF-8 has its stray bytes as U+DC80 to U+DCFF (PEP 383), which JSON writes as ``\\udc80``.
"""

from __future__ import annotations

import json

from unionfsd.typed import Any, Final, NamedTuple, TypeAlias

Json: TypeAlias = Any
"""What `json` makes of a JSON text."""
Id: TypeAlias = str | int | float | None
_INFINITY: Final = float("inf")

MAX_FRAME: Final = 64 * 1024
"""Bytes of a request, its line end included."""
MAX_DEPTH: Final = 16
"""Arrays and objects in each other in a request."""
MAX_BATCH: Final = 32
"""Requests in a batch."""

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
# The range -32000 to -32099 is the server's own.
FAILED: Final = -32000
"""A system call failed; `data` has its `errno` by name."""
BUSY: Final = -32001
"""Too much is being asked at once, or the mount is doing something that excludes this."""
REFUSED: Final = -32002
"""This client may not use the socket."""
UNSUPPORTED: Final = -32003
"""This mount cannot do it, for its options or its kernel."""
GIVEN_UP: Final = -32004
"""The processes that served the mount died one after the other, and its keeper gave up: every request on it fails."""

ERRORS: Final = {
    PARSE_ERROR: "Parse error",
    INVALID_REQUEST: "Invalid request",
    METHOD_NOT_FOUND: "Method not found",
    INVALID_PARAMS: "Invalid params",
    INTERNAL_ERROR: "Internal error",
    FAILED: "Failed",
    BUSY: "Busy",
    REFUSED: "Refused",
    UNSUPPORTED: "Unsupported",
    GIVEN_UP: "Given up",
}


class RpcError(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, code: int, message: str, data: Json = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


class Request(NamedTuple):
    """One call. `id` is None for a notification too, which `answered` tells apart."""

    method: str
    params: dict[str, Json] | list[Json]
    id: Id
    answered: bool


class Broken(NamedTuple):
    """What was meant to be a call and is none, and the error that is its answer."""

    refusal: RpcError
    id: Id


def decode(frame: bytes) -> Json:
    """The JSON value of a frame; RpcError unless it is one, of bounded depth."""
    try:
        value = json.loads(frame.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # bad UTF-8, JSON and numbers too long to convert are ValueErrors
        raise RpcError(PARSE_ERROR, f"not JSON: {type(error).__name__}") from None
    if _too_deep(value):
        raise RpcError(INVALID_REQUEST, f"deeper than {MAX_DEPTH} levels")
    return value


def _no_constant(text: str) -> Json:
    raise ValueError(text)


def _too_deep(value: Json) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return any(isinstance(outer, dict | list) for outer in level)


def _inside(value: Json) -> list[Json]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def requests(value: Json) -> tuple[list[Request | Broken], bool]:
    """The calls in a decoded frame, and whether they are a batch; RpcError for an empty or too large one."""
    if not isinstance(value, list):
        return [_request(value)], False
    if not 0 < len(value) <= MAX_BATCH:
        raise RpcError(INVALID_REQUEST, f"a batch has 1 to {MAX_BATCH} requests")
    return [_request(item) for item in value], True


def _request(value: Json) -> Request | Broken:
    if not isinstance(value, dict):
        return _broken("not an object", None)
    given = value.get("id")
    if isinstance(given, bool) or not isinstance(given, str | int | float | None) or given in (_INFINITY, -_INFINITY):
        return _broken("id is no string, number or null", None)
    if value.get("jsonrpc") != "2.0":
        return _broken('jsonrpc is not "2.0"', given)
    if not isinstance(value.get("method"), str):
        return _broken("method is no string", given)
    params = value.get("params", {})
    if not isinstance(params, dict | list):
        return _broken("params is no object or array", given)
    return Request(value["method"], params, given, "id" in value)


def _broken(why: str, given: Id) -> Broken:
    return Broken(RpcError(INVALID_REQUEST, why), given)


# What is sent.


def encode(message: Json) -> bytes:
    """A frame. What is no UTF-8 in a name survives, as escapes."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def call(method: str, params: dict[str, Json], identity: Id) -> Json:
    """A request, or a notification where `identity` is None."""
    message: dict[str, Json] = {"jsonrpc": "2.0", "method": method, "params": params}
    if identity is not None:
        message["id"] = identity
    return message


def result(value: Json, identity: Id) -> Json:
    """The answer to a call that worked."""
    return {"jsonrpc": "2.0", "result": value, "id": identity}


def error(refusal: RpcError, identity: Id) -> Json:
    """The answer to a call that did not."""
    body: dict[str, Json] = {"code": refusal.code, "message": f"{ERRORS[refusal.code]}: {refusal.message}"}
    if refusal.data is not None:
        body["data"] = refusal.data
    return {"jsonrpc": "2.0", "error": body, "id": identity}
