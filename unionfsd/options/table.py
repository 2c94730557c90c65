"""The table of mount options: it drives parsing, ``--help`` and docs/options.md.

A row says what an option does by an effect (`options.effects`).
"""

from __future__ import annotations

from unionfsd.options.effects import (
    AddLower,
    Anyway,
    Flag,
    Lowers,
    Nothing,
    Option,
    Refused,
    Security,
    SquashToRoot,
    Value,
    Word,
)
from unionfsd.options.mountflags import (
    MS_DIRSYNC,
    MS_NOATIME,
    MS_NODEV,
    MS_NODIRATIME,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RELATIME,
    MS_STRICTATIME,
    MS_SYNCHRONOUS,
)
from unionfsd.options.text import (
    one_of,
    read_control,
    read_id,
    read_mapping,
    read_path,
    read_seconds,
    read_switch,
    read_text,
    read_trees,
    read_writeback,
)
from unionfsd.typed import Final

FOREVER: Final = 1e9
"""Seconds (31 years) that a kernel may cache what only this mount changes; what fuse-overlayfs gives, too."""


_ATIME: Final = MS_NOATIME | MS_RELATIME | MS_STRICTATIME
_IGNORED: Final = "Accepted, without effect."

GROUPS: Final[tuple[tuple[str, tuple[Option, ...]], ...]] = (
    (
        "Layers",
        (
            Option(
                "lowerdir",
                Lowers(),
                "Read-only layers, the top one first. Any number. `\\:`, `\\,` and `\\\\` stand for the characters "
                "themselves; a relative path starts at the current directory; a symlink is followed. Layers after `::` "
                "are data-only: nothing of them shows but the data of files that lead there (see `metacopy`).",
                "DIR[:DIR...][::DIR...]",
            ),
            Option(
                "lowerdir+",
                AddLower("lowerdirs"),
                "One more lower, beneath those given before it. Colons need no escape here.",
                "DIR",
            ),
            Option(
                "datadir+",
                AddLower("datadirs"),
                "One more data-only layer, beneath all lowers and those given before it.",
                "DIR",
            ),
            Option(
                "upperdir",
                Value("upperdir", read_path),
                "The writable layer. Without one the union is read-only.",
                "DIR",
            ),
            Option(
                "workdir",
                Value("workdir", read_path),
                "A directory for unfinished work, empty at first, on the file system of the upper and beside it. "
                "Needed with `upperdir`.",
                "DIR",
            ),
            Option(
                "verify",
                Value("verify", read_trees),
                "What lowers must hold, checked when they are used (images.md): files that `unionfsctl image` makes, "
                "one for each lower, then for each data-only layer, in their order, each after its SHA-256 if that is "
                "to hold, too; nothing between colons for a layer that is not checked. What differs is EIO.",
                "[SHA256@]FILE[:FILE...]",
            ),
            Option(
                "volatile",
                Word("volatile", True),
                "Skip every sync of the upper: faster, and after a crash of the machine the upper must be thrown away.",
            ),
            Option(
                "accept_volatile",
                Word("accept_volatile", True),
                "Mount an upper that was mounted `volatile` before, which is refused otherwise: somebody knows that it "
                "is whole. Needed once.",
            ),
            Option(
                "fsync",
                Value("fsync", read_switch),
                "`0`: skip every sync of the upper, like `volatile`, but leave no mark that it was so.",
                "0|1",
                "1",
            ),
            Option(
                "whiteout",
                Value("whiteout", one_of("auto", "chardev", "xattr", "wh")),
                "How a deletion is recorded in the upper: a 0:0 character device, an xattr on an empty file, or an "
                "empty `.wh.NAME` file. `auto` takes the first that works. All are understood in every layer.",
                "auto|chardev|xattr|wh",
                "auto",
            ),
            Option(
                "userxattr",
                Word("userxattr", True),
                "Keep internal xattrs in the namespace `user` instead of `trusted`, which needs privileges.",
                default="where `trusted` cannot be used",
            ),
        ),
    ),
    (
        "Access",
        (
            Option("ro", Word("ro", True), "Mount read-only."),
            Option("rw", Word("ro", False), "Mount read-write, if there is an upper.", default="yes"),
            Option(
                "allow_other",
                Word("allow_other", True),
                "Let other users than the one who mounts in. For an ordinary user this needs `user_allow_other` in "
                "/etc/fuse.conf.",
                default="for root",
            ),
            Option(
                "default_permissions",
                Nothing(),
                "The kernel checks owner, mode and ACLs.",
                default="always",
            ),
            Option("uid", Value("uid", read_id), "Show everything as owned by this user.", "ID"),
            Option("gid", Value("gid", read_id), "Show everything as owned by this group.", "ID"),
            Option("squash_to_uid", Value("uid", read_id), "The same as `uid`.", "ID"),
            Option("squash_to_gid", Value("gid", read_id), "The same as `gid`.", "ID"),
            Option(
                "squash_to_root",
                SquashToRoot(),
                "Show everything as owned by root, unless `uid` or `gid` say otherwise. With any of these, changes "
                "of owner that the upper refuses succeed.",
            ),
            Option(
                "uidmapping",
                Value("uidmapping", read_mapping),
                "Show user ids from CONTAINER on as those from HOST on, COUNT of them, and keep them the other way "
                "round. Others are shown as the overflow id (65534), and nothing can be given to them (EINVAL).",
                "CONTAINER:HOST:COUNT[:...]",
            ),
            Option(
                "gidmapping",
                Value("gidmapping", read_mapping),
                "The same for group ids.",
                "CONTAINER:HOST:COUNT[:...]",
            ),
            Option(
                "xattr_permissions",
                Value("xattr_permissions", one_of("0", "1", "2")),
                "Keep owners and modes of the upper in an xattr: `1` in `security.fuseoverlayfs.override_stat`, `2` in "
                "`user.containers.override_stat`. Layers whose root bears one of these are understood without it.",
                "0|1|2",
                "0",
            ),
            Option("noacl", Word("noacl", True), "No access control lists: those of the layers do not count."),
            Option(
                "noxattrs",
                Value("noxattrs", read_switch),
                "Show and take no extended attributes.",
                "0|1",
                "0",
            ),
            Option(
                "static_nlink",
                Word("static_nlink", True),
                "Every directory has a link count of 1, not only those that are merged.",
            ),
            Option(
                "suid",
                Flag(off=MS_NOSUID),
                "Honour set-user-id bits and file capabilities.",
                default="for root",
            ),
            Option("nosuid", Flag(on=MS_NOSUID), "Do not honour them.", default="for ordinary users, always"),
            Option("dev", Flag(off=MS_NODEV), "Let device nodes work.", default="for root"),
            Option("nodev", Flag(on=MS_NODEV), "Device nodes are dead.", default="for ordinary users, always"),
            Option("exec", Flag(off=MS_NOEXEC), "Let programs run.", default="yes"),
            Option("noexec", Flag(on=MS_NOEXEC), "No programs run."),
            Option("atime", Flag(off=MS_NOATIME), "Keep access times as the layer's file system does."),
            Option("noatime", Flag(on=MS_NOATIME, off=_ATIME), "Keep no access times."),
            Option("relatime", Flag(on=MS_RELATIME, off=_ATIME), "Access times only after changes."),
            Option("norelatime", Flag(off=MS_RELATIME), "Undo `relatime`."),
            Option("strictatime", Flag(on=MS_STRICTATIME, off=_ATIME), "Access times at every access."),
            Option("nostrictatime", Flag(off=MS_STRICTATIME), "Undo `strictatime`."),
            Option("diratime", Flag(off=MS_NODIRATIME), "Access times of directories, too."),
            Option("nodiratime", Flag(on=MS_NODIRATIME), "No access times of directories."),
            Option("sync", Flag(on=MS_SYNCHRONOUS), "Every write reaches the disk before it returns."),
            Option("async", Flag(off=MS_SYNCHRONOUS), "Undo `sync`.", default="yes"),
            Option("dirsync", Flag(on=MS_DIRSYNC), "The same for changes of directories."),
            Option(
                "remount",
                Refused("only on the command line, to change the flags of a mount: -o remount,ro"),
                "Change the flags of what is mounted at the mountpoint (`ro`, `rw`, `nodev` and the like); everything "
                "else stays as it is. Only on the command line.",
            ),
            Option(
                "context",
                Security(),
                "SELinux labels, handed to the kernel where it has SELinux, else ignored; likewise `fscontext`, "
                "`defcontext` and `rootcontext`.",
                '"LABEL"',
            ),
            Option("fscontext", Security(), "See `context`.", '"LABEL"'),
            Option("defcontext", Security(), "See `context`.", '"LABEL"'),
            Option("rootcontext", Security(), "See `context`.", '"LABEL"'),
        ),
    ),
    (
        "Running",
        (
            Option(
                "fsname",
                Value("fsname", read_text),
                "The source shown in the mount table.",
                "NAME",
                "SOURCE, else `unionfsd`",
            ),
            Option(
                "subtype",
                Value("subtype", read_text),
                "The type shown in the mount table is `fuse.NAME`.",
                "NAME",
                "unionfsd",
            ),
            Option(
                "timeout",
                Value("timeout", read_seconds),
                "How long the kernel may cache names and attributes. Lower it only when the layers change underneath "
                "the mount, which overlayfs leaves undefined.",
                "SECONDS",
                f"{FOREVER:.0f}",
            ),
            Option(
                "transport",
                Value("transport", one_of("auto", "channel", "pyfuse3")),
                "How the kernel is spoken to: our own reader of /dev/fuse, or libfuse through pyfuse3.",
                "auto|channel|pyfuse3",
                "auto",
            ),
            Option(
                "io",
                Value("io", one_of("auto", "cached", "passthrough")),
                "How file data travels: through the kernel's page cache, or straight to the layer's file.",
                "auto|cached|passthrough",
                "auto",
            ),
            Option(
                "writeback",
                Value("writeback", read_writeback),
                "Whether the kernel gathers what is written and hands it over later, at close, at fsync or after some "
                "seconds: many small writes are then one. A write that finds no space fails there, and not in the "
                "write. `auto` is on, unless `timeout` says that the layers change underneath. Not with "
                "`io=passthrough`, nor over pyfuse3. `1` and `0` are taken, too.",
                "auto|on|off",
                "auto",
            ),
            Option("debug", Word("debug", True), "Stay in the foreground and log everything, like `-d`."),
            Option("keeper", Value("keeper", one_of("on", "off")), "Survive crashes (survival.md).", "on|off", "on"),
            Option(
                "spare",
                Value("spare", read_seconds),
                "Leave a process behind that waits so long for further mounts of the same user, which then take "
                "a third of the time (podman.md).",
                "SECONDS",
                "0",
            ),
            Option(
                "control",
                Value("control", read_control),
                "Where the socket for `unionfsctl` and other clients is (control.md): a path, `auto` for one in "
                "/run/unionfsd or `$XDG_RUNTIME_DIR/unionfsd`, `off` for none.",
                "PATH",
                "auto",
            ),
            Option(
                "control_group",
                Value("control_group", read_text),
                "The group, by name or number, whose members may use the control socket, too.",
                "GROUP",
            ),
            Option(
                "events",
                Value("events", one_of("auto", "on")),
                "Record what changes, for `unionfsctl events`: once somebody asks, or from the beginning.",
                "auto|on",
                "auto",
            ),
            Option(
                "log",
                Value("log", read_path),
                "Append the log to this file.",
                "FILE",
                "standard error in the foreground, else syslog",
            ),
        ),
    ),
    (
        "Options of kernel overlayfs",
        (
            Option(
                "redirect_dir",
                Value("redirect_dir", one_of("on", "follow", "nofollow", "off")),
                "Renaming of directories that have a lower part. `on` records where they came from; the others make "
                "such a rename EXDEV. What was recorded is followed, except with `nofollow`.",
                "on|follow|nofollow|off",
                "on",
            ),
            Option(
                "metacopy",
                Value("metacopy", one_of("off", "on")),
                "Changes of owner, mode, times and xattrs copy no data up: it follows at the first write. Files of "
                "layers whose data is in a layer below are read only with `on`, or if it is in a data-only layer: who "
                "can write a layer could name any file of those below.",
                "off|on",
                "off",
            ),
            Option(
                "index",
                Value("index", one_of("auto", "on", "off")),
                "Hard links of lowers survive copy-up: all names show the one copy. `auto` does so where layers can "
                "(file handles, xattrs) unless the upper was used with another topmost lower, which `on` refuses.",
                "auto|on|off",
                "auto",
            ),
            Option(
                "rebase",
                Word("rebase", True),
                "Accept lowers other than those that the upper was used with, which is refused otherwise: what it says "
                "of those becomes true of these. Needed once.",
            ),
            Option(
                "nfs_export",
                Value("nfs_export", one_of("off", "on")),
                "File handles (name_to_handle_at(2)) mean the same object for as long as it is there, after a remount, "
                "too, so that the mount can be exported by NFS. Takes memory for every object that was ever looked up, "
                "and does without a `keeper`. A read-only union needs a `workdir` for it. With `off` there are no file "
                "handles.",
                "off|on",
                "off",
            ),
            Option(
                "xino",
                Anyway(("auto", "on", "off")),
                "Inode numbers are unique over the layers' file systems and kept over remounts in any case: the mount "
                "has one device number.",
                "auto|on|off",
                "on",
            ),
            Option(
                "uuid",
                Value("uuid", one_of("null", "off", "auto", "on")),
                "Whether the upper gets a UUID of its own, as the kernel keeps it: `on` always, `auto` if nothing was "
                "copied up in it yet. FUSE has no way to show it by statfs(2).",
                "null|off|auto|on",
                "null",
            ),
            Option(
                "verity",
                Value("verity", one_of("off", "on", "require")),
                "Check the data of files that lie in a layer below against the fs-verity digest recorded with them, "
                "when it is first read; `require` refuses those without one.",
                "off|on|require",
                "off",
            ),
        ),
    ),
    (
        "Refused",
        (
            Option(
                "plugins",
                Refused("there are no plugins; name the layers' directories in lowerdir"),
                "fuse-overlayfs's programs that provide lowers.",
                "PATH[:PATH...]",
            ),
        ),
    ),
    (
        "Accepted, without effect",
        tuple(
            Option(name, Nothing(), _IGNORED, argument)
            for name, argument in (
                *((word, "") for word in ("defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser")),
                *((word, "") for word in ("users", "nousers", "owner", "noowner", "group", "nogroup")),
                *((word, "") for word in ("private", "rprivate", "slave", "rslave", "shared", "rshared")),
                *((word, "") for word in ("unbindable", "runbindable", "nonempty", "big_writes")),
                *((word, "") for word in ("lazytime", "nolazytime", "mand", "nomand", "silent", "loud")),
                *((word, "") for word in ("clone_fd", "allow_root", "kernel_cache")),
                *((word, "") for word in ("splice_read", "splice_write", "splice_move")),
                *((word, "N") for word in ("threaded", "max_idle_threads", "max_threads", "max_write")),
                ("fast_ino", "0|1"),
                ("comment", "TEXT"),
                ("x-*", ""),
            )
        ),
    ),
)

OPTIONS: Final[tuple[Option, ...]] = tuple(option for _, options in GROUPS for option in options)
