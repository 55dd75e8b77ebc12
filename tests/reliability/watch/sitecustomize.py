"""Python imports this at its start where the folder is on PYTHONPATH: from then on nobody reaches the network, and
OFB_WATCH, a file, has a line for each process, try, and file opened for writing.

Python says what it is about to do (PEP 578). The kernel ends any process whose native code asks for an internet socket.
"""

import ctypes
import json
import os
import platform
import struct
import sys
import traceback

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto")
CHANGES = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "sqlite3.connect")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What a seccomp filter is made of: linux/filter.h, linux/seccomp.h, linux/audit.h.
LOAD, EQUAL, RETURN, ALLOW, KILL = 0x20, 0x15, 0x06, 0x7FFF0000, 0x80000000
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
SOCKET = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # architecture, number of the system call
INTERNET = (2, 10)  # AF_INET, AF_INET6


def note(kind: str, what: object) -> None:
    line = {"process": os.getpid(), "kind": kind, "what": what}
    os.write(LOG, (json.dumps(line, default=repr) + "\n").encode())


def watch(event: str, arguments: tuple) -> None:
    if event in NETWORK and not _is_local(arguments):
        note("network", [event, repr(arguments), traceback.format_stack(limit=12)])
        raise PermissionError(f"{event}{arguments}: no network in this test")
    if event == "open" and arguments[2] & WRITING and not isinstance(arguments[0], int):
        note("write", os.path.abspath(os.fsdecode(arguments[0])))
    elif event in CHANGES:
        note("write", os.path.abspath(os.fsdecode(arguments[1 if event in CHANGES[1:4] else 0])))


def forbid_internet_sockets() -> None:
    """The kernel ends a process that asks for one, and so do its children; where this machine can."""
    if sys.platform != "linux" or platform.machine() not in SOCKET:
        return
    architecture, number = SOCKET[platform.machine()]
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 0, 5, architecture), (LOAD, 0, 0, NUMBER), (EQUAL, 0, 3, number)]
    steps += [(LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 2, 0, INTERNET[0]), (EQUAL, 1, 0, INTERNET[1])]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, KILL)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    library = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filtered = 38, 22, 2
    for call in ((no_new_privileges, 1, 0, 0, 0), (set_seccomp, filtered, program, 0, 0)):
        if library.prctl(*call):
            raise OSError(ctypes.get_errno(), "prctl")


def _is_local(arguments: tuple) -> bool:
    """A socket of the file system, by which processes of one machine speak."""
    return len(arguments) > 1 and isinstance(arguments[1], str | bytes) and hasattr(arguments[0], "family")


LOG = os.open(os.environ["OFB_WATCH"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
note("process", sys.argv if hasattr(sys, "argv") else [])
os.register_at_fork(after_in_child=lambda: note("process", "forked"))
forbid_internet_sockets()
sys.addaudithook(watch)
