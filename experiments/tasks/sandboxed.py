"""The child of `sandbox.py`: limits itself, runs the program it is given, and only then says a word.

Run as a file by an isolated interpreter; it imports nothing but the standard library.
First line of the input: seconds, bytes of memory, the word, bytes of the program. Then the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys
from typing import Any

# System calls that send signals, make processes, start programs, open sockets, reach into other processes, or
# remove, rename and make files: audit architecture, numbers (asm/unistd.h).
CALLS = {
    "x86_64": (
        0xC000003E,
        "62 200 234 129 297 424 56 57 58 435 59 322 41 101 310 311 425 "
        "76 82 83 84 86 87 88 258 263 264 265 266 316",
    ),
    "aarch64": (
        0xC00000B7,
        "129 130 131 138 240 424 220 435 221 281 198 117 270 271 425 34 35 36 37 38 45 276",
    ),
}
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of the kernel's filter (linux/filter.h)
ALLOW, REFUSE = 0x7FFF0000, 0x00050001  # the latter: the error EPERM
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2  # of prctl

READING = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "os.listxattr")
REFUSED = (  # beginnings of audit events
    *(
        "os.",
        "subprocess.",
        "socket.",
        "shutil.",
        "ctypes.",
        "signal.",
        "fcntl.",
        "pty.",
        "mmap.",
        "resource.",
    ),
    *("syslog.", "urllib.", "http.", "ftplib.", "smtplib.", "webbrowser.", "tempfile."),
)
FOREIGN = ("ctypes", "_ctypes", "_posixsubprocess", "cffi", "_multiprocessing", "faulthandler")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Read, seal, run, tell."""
    seconds, memory, word, n_bytes = sys.stdin.buffer.readline().split()
    source = sys.stdin.buffer.read(int(n_bytes))
    told = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    limit(int(seconds), int(memory))
    try:
        seal()
    except (KeyError, OSError, AttributeError):  # not Linux, or a kernel without filters
        _forget_silent_signals()
    for name in [name for name in sys.modules if "ctypes" in name]:
        del sys.modules[name]  # so that the hook sees another import
    say = os.write
    code = compile(source, "program", "exec")
    sys.addaudithook(refuse)
    exec(code, {"__name__": "program"})
    say(told, word)


def limit(seconds: int, memory: int) -> None:
    """Set the limits of the process; one that this system has not is left out."""
    wanted = {"CPU": seconds, "AS": memory, "FSIZE": 0, "CORE": 0, "NPROC": 0, "NOFILE": 32}
    for name, value in wanted.items():
        with contextlib.suppress(ValueError, OSError, AttributeError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def seal() -> None:
    """Have the kernel refuse `CALLS` from now on, whatever the interpreter is made to do.

    Raises:
        KeyError: the numbers are not known for this machine.
        OSError: the kernel has no filters.
        AttributeError: the system has no `prctl`.
    """
    arch, listed = CALLS[platform.machine()]
    numbers = [int(number) for number in listed.split()]
    n = len(numbers)
    # each rule: instruction, steps to skip if true, if false, operand; the last two are "allow" and "refuse"
    rules = [(LOAD, 0, 0, 4), (EQUAL, 0, n + 3, arch), (LOAD, 0, 0, 0), (AT_LEAST, n + 1, 0, 1 << 30)]
    rules += [(EQUAL, n - i, 0, number) for i, number in enumerate(numbers)]
    rules += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    table = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HL", len(rules), ctypes.addressof(table)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    if prctl(NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero) or prctl(
        SECCOMP, ctypes.c_ulong(FILTER), program, zero, zero
    ):
        raise OSError(ctypes.get_errno(), "prctl")


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise on what a program may not do.

    Raises:
        PermissionError: it wants to write, to reach another process or the network, or to run foreign code.
    """
    if event == "open" and (arguments[2] or 0) & WRITING:
        raise PermissionError("a program may not write")
    if event == "import" and arguments[0] in FOREIGN:
        raise PermissionError(f"a program may not import {arguments[0]}")
    if event.startswith(REFUSED) and event not in READING:
        raise PermissionError(f"a program may not do {event}")


def _forget_silent_signals() -> None:
    """Remove the one way to a signal that raises no audit event."""
    for name in ("signal", "_signal"):
        vars(__import__(name)).pop("pidfd_send_signal", None)


if __name__ == "__main__":
    main()
