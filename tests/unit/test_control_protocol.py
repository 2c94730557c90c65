"""What may be said on a control socket: frames, bounds, and the table of methods."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfsd.control import protocol, schema
from unionfsd.control.__main__ import renewed
from unionfsd.control.methods import Methods
from unionfsd.control.protocol import Broken, Json, Request, RpcError
from unionfsd.control.schema import METHODS, Method
from unionfsd.control.shapes import Param

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "control.md"

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()
)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=20
)
fields = st.sampled_from(["jsonrpc", "method", "params", "id", "other"])


def code_of(frame: bytes) -> int:
    with pytest.raises(RpcError) as caught:
        protocol.requests(protocol.decode(frame))
    return caught.value.code


# Frames.


@given(st.binary(max_size=200))
def test_any_bytes_are_requests_or_refused(frame: bytes) -> None:
    calls = understood(frame)
    assert calls if isinstance(calls, list) else calls.code in protocol.ERRORS


def understood(frame: bytes) -> list[Request | Broken] | RpcError:
    try:
        return protocol.requests(protocol.decode(frame))[0]
    except RpcError as error:
        return error


@given(values | st.dictionaries(fields, values | st.just("2.0")))
def test_any_value_is_requests_or_refused_and_can_be_answered(value: Json) -> None:
    frame = protocol.encode(value)
    assert frame.endswith(b"\n")
    assert b"\n" not in frame[:-1]
    calls = understood(frame)
    if isinstance(calls, RpcError):
        assert json.loads(protocol.encode(protocol.error(calls, None)))["error"]["code"] == calls.code
        return
    for call in calls:
        if isinstance(call, Broken):
            assert json.loads(protocol.encode(protocol.error(call.refusal, call.id)))["id"] == call.id
        else:
            assert json.loads(protocol.encode(protocol.result(None, call.id)))["id"] == call.id


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"rubbish",
        b'{"jsonrpc":',
        b"\xff\xfe{}",
        b'{"id":NaN}',
        b"[Infinity]",
        b"1" * 60_000,
        b"[" * 60_000,
        b'{"a":' * 10_000,
    ],
)
def test_what_is_no_json_is_a_parse_error(frame: bytes) -> None:
    assert code_of(frame) == protocol.PARSE_ERROR


def test_depth_is_bounded() -> None:
    deepest = b"[" * protocol.MAX_DEPTH + b"]" * protocol.MAX_DEPTH
    assert protocol.decode(deepest) is not None
    assert code_of(b"[" + deepest + b"]") == protocol.INVALID_REQUEST
    assert code_of(b'{"a":' * 20 + b"1" + b"}" * 20) == protocol.INVALID_REQUEST


def test_a_request() -> None:
    calls, batch = protocol.requests({"jsonrpc": "2.0", "method": "m", "params": [1], "id": "x"})
    assert (calls, batch) == ([Request("m", [1], "x", True)], False)


def test_a_notification_has_no_id_and_null_is_one() -> None:
    (call,), _ = protocol.requests({"jsonrpc": "2.0", "method": "m"})
    assert isinstance(call, Request)
    assert not call.answered
    (call,), _ = protocol.requests({"jsonrpc": "2.0", "method": "m", "id": None})
    assert isinstance(call, Request)
    assert call.answered


@pytest.mark.parametrize(
    ("value", "identity"),
    [
        (1, None),
        ({}, None),
        ({"jsonrpc": "1.0", "method": "m", "id": 7}, 7),
        ({"jsonrpc": "2.0", "id": 7}, 7),
        ({"jsonrpc": "2.0", "method": 1, "id": 7}, 7),
        ({"jsonrpc": "2.0", "method": "m", "params": 1, "id": 7}, 7),
        ({"jsonrpc": "2.0", "method": "m", "id": []}, None),
        ({"jsonrpc": "2.0", "method": "m", "id": True}, None),
        ({"jsonrpc": "2.0", "method": "m", "id": float("inf")}, None),
    ],
)
def test_what_is_no_request_is_answered_as_far_as_it_can_be(value: Json, identity: object) -> None:
    (call,), _ = protocol.requests(value)
    assert isinstance(call, Broken)
    assert (call.refusal.code, call.id) == (protocol.INVALID_REQUEST, identity)


def test_a_batch() -> None:
    calls, batch = protocol.requests([1, {"jsonrpc": "2.0", "method": "m", "id": 1}])
    assert batch
    assert [type(call) for call in calls] == [Broken, Request]
    assert code_of(b"[]") == protocol.INVALID_REQUEST
    assert code_of(json.dumps([1] * (protocol.MAX_BATCH + 1)).encode()) == protocol.INVALID_REQUEST


def test_names_that_are_no_utf8_survive() -> None:
    name = b"\xff\xe9\n\x1b".decode("utf-8", "surrogateescape")
    assert protocol.decode(protocol.encode([name])) == [name]
    (explain,) = (method for method in METHODS if method.name == "explain")
    assert schema.bind(explain, {"path": name}) == {"path": b"\xff\xe9\n\x1b"}


# The table.


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_of_the_table_has_its_function(method: Method) -> None:
    function = getattr(Methods, method.name.replace(".", "_"))
    assert inspect.iscoroutinefunction(function)
    this, call, *parameters = inspect.signature(function).parameters.values()
    assert (this.name, call.name) == ("self", "call")
    assert [parameter.name for parameter in parameters] == [param.name for param in method.params]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)


def test_every_public_function_is_in_the_table() -> None:
    functions = {name for name in vars(Methods) if not name.startswith("_")} - {"named", "keep"}
    assert functions == {method.name.replace(".", "_") for method in METHODS}


def test_the_description_is_the_table() -> None:
    described = schema.openrpc()
    json.dumps(described)
    assert described["openrpc"].startswith("1.")
    assert [method["name"] for method in described["methods"]] == [method.name for method in METHODS]
    for told, method in zip(described["methods"], METHODS, strict=True):
        assert [param["name"] for param in told["params"]] == [param.name for param in method.params]
        assert [param["required"] for param in told["params"]] == [param.required for param in method.params]
        assert told["result"]["schema"] == method.result


def test_the_documentation_is_the_table() -> None:
    text = DOCUMENT.read_text()
    assert renewed(text) == text, "run: python -m unionfsd.control docs/control.md"


PARAMS = [(method, param) for method in METHODS for param in method.params]
BAD: list[Json] = [None, True, -1, 10**30, 1.5, "\0", "no such word", "\ud800", [], {}, float("inf")]


@pytest.mark.parametrize(("method", "param"), PARAMS, ids=lambda value: value.name)
def test_a_parameter_takes_what_it_says(method: Method, param: Param) -> None:
    """Its default, and of all that is odd either a value of its own schema or nothing."""
    if not param.required:
        param.read(param.default)
    others = {other.name: "/" for other in method.params if other.required and other != param}
    reasons = [reason for value in BAD if (reason := refusal(method, {**others, param.name: value}))]
    assert len(reasons) >= len(BAD) - 3
    assert all(param.name in reason for reason in reasons)


def refusal(method: Method, given: dict[str, Json]) -> str | None:
    try:
        schema.bind(method, given)
    except RpcError as error:
        return error.message if error.code == protocol.INVALID_PARAMS else None
    return None


def test_parameters_by_position_and_by_name() -> None:
    (du,) = (method for method in METHODS if method.name == "du")
    by_name = schema.bind(du, {"path": "/x", "depth": 3})
    assert by_name == schema.bind(du, ["/x", 3])
    assert by_name["path"] == b"/x"
    for wrong in ({"nope": 1}, ["/", 1, 1, False, 5], {"path": 1}):
        with pytest.raises(RpcError) as caught:
            schema.bind(du, wrong)
        assert caught.value.code == protocol.INVALID_PARAMS


def test_what_is_required_must_be_there() -> None:
    (explain,) = (method for method in METHODS if method.name == "explain")
    with pytest.raises(RpcError, match="path is missing"):
        schema.bind(explain, {})
