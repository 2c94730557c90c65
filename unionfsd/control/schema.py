"""The methods of the control socket: one table that drives the checks, ``rpc.discover`` and the documentation.

A row says what a method takes and what it gives, as JSON Schema. The code behind it is the function of the same name in
`methods`, with the same parameters; the tests hold both to this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from unionfsd import __version__
from unionfsd.control.protocol import ERRORS, INVALID_PARAMS, Json, RpcError
from unionfsd.control.shapes import (
    ANY,
    BOOLEAN,
    INTEGER,
    NUMBER,
    STRING,
    Param,
    Schema,
    array,
    integer,
    mapping,
    optional,
    read_flag,
    read_number_or_none,
    read_path,
    read_seconds,
    read_word,
    record,
    words,
)
from unionfsd.typed import Any, Final

MAX_ITEMS: Final = 100_000
MAX_FREEZE: Final = 3600.0
LEVELS: Final = ("debug", "info", "warning", "error")

_PATH: Final = Param("path", "A path from the root of the mount.", STRING, read_path, required=True)
_BELOW: Final = Param("path", "Only what is beneath this directory of the mount.", STRING, read_path, "/")
_PROGRESS: Final = Param(
    "progress", "Send notifications `progress` while it takes long: `{id, done}`.", BOOLEAN, read_flag, False
)
_STREAM: Final = Param(
    "stream",
    "Send the items in notifications `items`, `{id, items}`, as they are found, without limit; the result has none.",
    BOOLEAN,
    read_flag,
    False,
)
_LIMIT: Final = integer("limit", "At most so many items; `truncated` says that there were more.", 0, MAX_ITEMS, 10_000)


# Results.

_LAYER: Final = record("Layer", index=INTEGER, role=words("upper", "lower"), path=STRING)
_DECISION: Final = record(
    "Decision", mark=words("whiteout", "opaque", "redirect", "not a directory", "covered"), layer=_LAYER, path=STRING
)
_XATTRS: Final = mapping(STRING)
_COPY: Final = record(
    "Copy",
    layer=_LAYER,
    path=STRING,
    role=words("gives", "merged", "covered", "hidden"),
    type=STRING,
    mode=INTEGER,
    uid=INTEGER,
    gid=INTEGER,
    size=INTEGER,
    mtime_ns=INTEGER,
    ino=INTEGER,
    dev=STRING,
    whiteout=optional(STRING),
    decided_by=optional(_DECISION),
    marks=_XATTRS,
)
_CHANGE: Final = record(
    "Change",
    kind=words("added", "changed", "deleted"),
    path=STRING,
    type=STRING,
    fields=array(STRING),
    renamed_from=optional(STRING),
)
_USAGE: Final = record("Usage", path=STRING, disk=INTEGER, apparent=INTEGER, objects=INTEGER, whiteouts=INTEGER)

_OPERATION: Final = record(
    "Operation", count=INTEGER, seconds=NUMBER, errors=mapping(INTEGER), histogram=array(INTEGER)
)

EVENTS: Final = (
    *("start", "copy-up", "create", "mkdir", "mknod", "symlink", "link", "unlink", "rmdir", "rename", "exchange"),
    *("write", "setattr", "setxattr", "removexattr", "corrupt"),
)
_EVENT: Final = record(
    "Event",
    number=INTEGER,
    time=NUMBER,
    kind=words(*EVENTS),
    path=optional(STRING),
    to=optional(STRING),
    fields=array(STRING),
    pid=optional(INTEGER),
    uid=optional(INTEGER),
)

_HOLDER: Final = record(
    "Holder",
    pid=INTEGER,
    uid=INTEGER,
    command=STRING,
    how=words("fd", "cwd", "root", "exe", "mapped"),
    fd=optional(INTEGER),
    access=optional(words("r", "w", "rw", "path")),
    path=STRING,
    deleted=BOOLEAN,
)
_WORK: Final = record("Work", kind=STRING, path=optional(STRING), done=INTEGER, total=optional(INTEGER), seconds=NUMBER)

TYPES: Final = (_LAYER, _DECISION, _COPY, _CHANGE, _USAGE, _OPERATION, _EVENT, _HOLDER, _WORK)


@dataclass(frozen=True, slots=True)
class Method:
    """A row. `acts`: it changes something. `note` says what the summary has no room for."""

    name: str
    summary: str
    result: Schema
    params: tuple[Param, ...] = ()
    acts: bool = False
    note: str = ""


METHODS: Final[tuple[Method, ...]] = (
    Method(
        "status",
        "What this mount is, and that it answers.",
        record(
            mountpoint=STRING,
            mounted=BOOLEAN,
            id=optional(INTEGER),
            pid=INTEGER,
            keeper=optional(INTEGER),
            restarts=INTEGER,
            owner=INTEGER,
            socket=STRING,
            source=STRING,
            transport=words("channel", "pyfuse3"),
            io=words("cached", "passthrough"),
            read_only=BOOLEAN,
            volatile=BOOLEAN,
            frozen=BOOLEAN,
            layers=array(_LAYER),
            version=STRING,
            uptime=NUMBER,
            options=mapping(ANY),
        ),
        note="`id` is the minor of the mount's device number, `pid` the process that serves, `owner` its user, "
        "`keeper` the process that starts another when that one dies, which it did `restarts` times. "
        "`uptime` is in seconds. `options` has those that were given.",
    ),
    Method(
        "layers",
        "The layers, the topmost first.",
        record(
            layers=array(
                record(
                    **_LAYER["properties"],
                    dev=STRING,
                    filesystem_uuid=optional(STRING),
                    private=BOOLEAN,
                    size=INTEGER,
                    available=INTEGER,
                )
            ),
            upper=optional(
                record(
                    workdir=STRING,
                    whiteout=STRING,
                    xattrs=optional(STRING),
                    tmpfile=BOOLEAN,
                    exchange=BOOLEAN,
                    rename_whiteout=BOOLEAN,
                )
            ),
        ),
        note="`private`: held as a read-only copy of its mount. `size` and `available` are bytes of its file system. "
        "`upper` says what the upper can do, and how it keeps whiteouts and marks.",
    ),
    Method(
        "stats",
        "What the mount has done so far, and what it holds.",
        record(
            uptime=NUMBER,
            counters=mapping(INTEGER),
            operations=mapping(_OPERATION),
            bounds=array(NUMBER),
            nodes=INTEGER,
            fds=INTEGER,
            cached_fds=INTEGER,
            fd_limit=INTEGER,
            fd_hits=INTEGER,
            fd_misses=INTEGER,
            fd_evictions=INTEGER,
            lists=INTEGER,
            names=INTEGER,
            lists_read=INTEGER,
            threads=INTEGER,
            cpu=NUMBER,
            memory=record(resident=INTEGER, peak=INTEGER),
            control=record(clients=INTEGER, calls=INTEGER, refused=INTEGER),
        ),
        note="Counters only grow. `operations` are the kernel's requests by kind, from being read to being answered "
        "(with `io=cached` the kernel opens and closes files without any); column i of a `histogram` has those that "
        "took at most `bounds[i]` seconds and more than the one before, the last column all others. A descriptor that "
        "was wanted was there (`fd_hits`) or was opened (`fd_misses`). `lists` of merged lower names are kept, with "
        "`names` in all. `cpu` is in seconds, `memory` in bytes.",
    ),
    Method(
        "explain",
        "Why the mount shows what it shows under a path.",
        record(
            path=STRING,
            exists=BOOLEAN,
            layer=optional(_LAYER),
            source=optional(STRING),
            copies=array(_COPY),
            decided_by=optional(_DECISION),
            xattrs=_XATTRS,
            ino=optional(record(number=INTEGER, layer=optional(_LAYER), source=optional(STRING))),
        ),
        (_PATH,),
        note="`layer` gives it and `source` is its path outside of the mount. `copies` are all there are of the path, "
        "top first: `gives`, `merged` into it, `covered` by one above, or `hidden` by the mark in `decided_by`. Values "
        "of xattrs are in base64. `ino` is the inode number and the object it is made from; pyfuse3 shows others. A "
        "symlink is not followed.",
    ),
    Method(
        "diff",
        "What the upper changes of the lowers.",
        record(items=array(_CHANGE), counts=mapping(INTEGER), truncated=BOOLEAN),
        (_BELOW, _LIMIT, _STREAM, _PROGRESS),
        note="Takes time in proportion to the upper. What was copied up and is equal to what it covers is no change. "
        "`fields` names what differs of something changed.",
    ),
    Method(
        "du",
        "The space that the upper takes, by directory.",
        record(total=optional(_USAGE), items=array(_USAGE), truncated=BOOLEAN),
        (_BELOW, integer("depth", "Levels of directories to list.", 0, 64, 1), _LIMIT, _PROGRESS),
        note="Largest first. `disk` is what is allocated, `apparent` what the sizes say, in bytes; `objects` without "
        "whiteouts. `total` is null when the upper has no such directory.",
    ),
    Method(
        "events",
        "What changes, and who changes it.",
        record(events=array(_EVENT), lost=INTEGER, next=INTEGER),
        (
            _BELOW,
            Param(
                "since",
                "From this number on; null: all that are kept, or with `follow` those to come.",
                optional(INTEGER),
                read_number_or_none,
            ),
            Param(
                "follow",
                "Send notifications `events`, `{id, events, lost, next}`, as they happen, until the client hangs up.",
                BOOLEAN,
                read_flag,
                False,
            ),
            integer("limit", "At most so many events; more come from `next` on.", 0, 4096, 1000),
        ),
        note="The last 4096 are kept. Recording begins with the first call, which the event `start` marks, or with the "
        "mount (`events=on`); it ends when nobody called or followed for ten minutes. Numbers have no gaps, and `lost` "
        "counts those that were dropped before they could be told. A change has happened when its event is sent. `to` "
        "is the new name of a rename, an exchange or a link, `fields` what a setattr changed or the name of an xattr. "
        "The first write of a process to a file is an event, further ones are not; with `io=passthrough` the daemon "
        "sees none. `pid` is as the daemon's pid namespace has it; 0 for pages that the kernel writes back, as it does "
        "most with its writeback cache (`writeback=`): files are opened without a message, so whose they are is not "
        "known; and null where the transport does not tell: pyfuse3 does not for writes. `corrupt`, "
        "with `verify=`, is kept whether or not anybody asked: `path` is that in the layer, `fields` "
        "what is wrong there (`data`, `metadata`, `names`, `missing`, `added`).",
    ),
    Method(
        "open",
        "Who holds something of the mount: open, mapped, as a directory they are in, as root or as program.",
        record(
            holders=array(_HOLDER),
            unseen=INTEGER,
            handles=optional(array(record(path=optional(STRING), opens=INTEGER))),
        ),
        (_BELOW,),
        note="`holders` is read from /proc: those that the daemon may look into, all of them only for root, and "
        "`unseen` counts the processes it may not. `path` is from the root of the mount where it can be told, else as "
        "the process sees it. `handles` are the files that the kernel told the daemon it has open; with `io=cached` it "
        "does not tell, and that is null. Whoever is in a file system as its loop device or swap is in neither.",
    ),
    Method(
        "work",
        "What takes long and is under way, and how far it is.",
        record(work=array(_WORK)),
        note="`done` and `total` of a copy-up are bytes; when they are the same it is being put on disk. Of `diff` and "
        "`du`, `done` are objects and `total` is null, as nobody knows it; of `sync` not even that is known.",
    ),
    Method(
        "hot",
        "Which paths the kernel asks about most, by samples.",
        record(samples=INTEGER, paths=array(record(path=optional(STRING), samples=INTEGER))),
        (integer("limit", "At most so many paths.", 0, 1000, 20),),
        note="Of what was asked since the last call, by anybody. Taking samples begins with a call, and ends when "
        "nobody wants to see them. What the kernel answers from its caches is not seen; a lookup counts for its "
        "directory.",
    ),
    Method(
        "options",
        "All mount options as they are in force.",
        record(options=mapping(ANY), explicit=array(STRING), warnings=array(STRING)),
        note="`explicit` names those that were given, `warnings` what was ignored, and why.",
    ),
    Method(
        "refresh",
        "Look again at layers that were changed underneath the mount.",
        record(nodes=INTEGER, replaced=INTEGER, kernel=BOOLEAN),
        (_BELOW, _PROGRESS),
        acts=True,
        note="`nodes` were known and looked up again, `replaced` of them are something else now or gone. `kernel`: it "
        "was told to look every name up again (Linux 6.16); otherwise it was told of those that exist, name by name.",
    ),
    Method(
        "sync",
        "Put the upper on disk.",
        record(seconds=NUMBER, volatile=BOOLEAN),
        (_PROGRESS,),
        acts=True,
        note="A mount with `volatile` does nothing, and says so.",
    ),
    Method(
        "freeze",
        "Let no change begin, and put the upper on disk: it can then be copied as it is.",
        record(seconds=NUMBER, thaws_in=NUMBER),
        (
            Param(
                "timeout",
                "Thaw after so many seconds at the latest.",
                {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_FREEZE},
                read_seconds(MAX_FREEZE),
                60,
            ),
        ),
        acts=True,
        note="Who wants to change something waits. Reading goes on, except that a name the kernel does not know yet is "
        "looked for after a change that waits in the same directory. It ends with `thaw`, after `timeout` seconds, and "
        "when the mount is to end. Not with `io=passthrough`, where writes do not come by.",
    ),
    Method(
        "thaw",
        "Let changes begin again.",
        record(frozen_for=NUMBER),
        acts=True,
        note="What waited comes first. `frozen_for` is 0 when the mount was not frozen.",
    ),
    Method(
        "log",
        "The level of the log, and a new one.",
        record(level=STRING, before=STRING),
        (Param("level", "From now on.", optional(words(*LEVELS)), read_word(*LEVELS)),),
        acts=True,
    ),
    Method(
        "drop_caches",
        "Let go of what can be read again: descriptors, merged names, and what the kernel caches of nodes.",
        record(fds=INTEGER, names=INTEGER, nodes=INTEGER, kernel=BOOLEAN),
        acts=True,
        note="`fds` descriptors were closed and `names` forgotten. `nodes` were known before, and `kernel` says "
        "whether it was asked to forget those that nobody uses (Linux 6.18). Data of files is dropped in any case.",
    ),
    Method(
        "unmount",
        "Unmount, as umount(8) does; `lazy` also while it is in use.",
        record(result=words("gone", "detached", "busy")),
        (Param("lazy", "Detach a busy mount: it ends when its last user leaves.", BOOLEAN, read_flag, False),),
        acts=True,
    ),
    Method(
        "reexec",
        "Go on with the program that is installed now, under load, with nothing unmounted.",
        record(keeper=INTEGER),
        acts=True,
        note="The new program is tried first; when it refuses, this fails, and the mount goes on as it is. It has "
        "taken over once `restarts` of `status` has grown.",
    ),
    Method(
        "rpc.discover",
        "This description: OpenRPC 1.3.2.",
        {"type": "object"},
    ),
)

BY_NAME: Final = {method.name: method for method in METHODS}


def bind(method: Method, given: dict[str, Json] | list[Json]) -> dict[str, Any]:
    """Arguments of a call, by name, checked and complete; RpcError. In an array they come in the table's order."""
    if isinstance(given, list):
        if len(given) > len(method.params):
            raise RpcError(INVALID_PARAMS, f"{method.name} takes at most {len(method.params)}")
        given = {param.name: value for param, value in zip(method.params, given, strict=False)}
    unknown = given.keys() - {param.name for param in method.params}
    if unknown:
        raise RpcError(INVALID_PARAMS, f"{method.name} has no parameter {min(unknown)[:64]!r}")
    return {param.name: _argument(param, given) for param in method.params}


def _argument(param: Param, given: dict[str, Json]) -> Any:
    if param.required and param.name not in given:
        raise RpcError(INVALID_PARAMS, f"{param.name} is missing")
    try:
        return param.read(given.get(param.name, param.default))
    except ValueError as error:
        raise RpcError(INVALID_PARAMS, f"{param.name}: {error}") from None


def openrpc() -> Json:
    """The description of all methods (https://spec.open-rpc.org)."""
    return {
        "openrpc": "1.3.2",
        "info": {"title": "unionfsd control socket", "version": __version__},
        "methods": [_describe(method) for method in METHODS],
        "components": {"errors": {str(code): {"code": code, "message": text} for code, text in ERRORS.items()}},
    }


def _describe(method: Method) -> Json:
    return {
        "name": method.name,
        "summary": method.summary,
        "description": method.note,
        "tags": [{"name": "acts" if method.acts else "reads"}],
        "paramStructure": "either",
        "params": [_describe_param(param) for param in method.params],
        "result": {"name": "result", "schema": method.result},
    }


def _describe_param(param: Param) -> Json:
    schema = param.schema if param.required else param.schema | {"default": param.default}
    return {"name": param.name, "description": param.help, "required": param.required, "schema": schema}
