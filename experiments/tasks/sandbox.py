"""Run a program that a model wrote, in a process of its own with little to break.

The kernel limits processor time and memory and lets no byte into a file; on Linux a filter of system calls
refuses signals, processes, sockets and the removal of files. An audit hook, which a program cannot take off
again, refuses the same and more from inside: opening to write, foreign code. The interpreter is isolated, in
an empty folder, without the environment. This stops accidents and clumsy programs, not an attacker who knows
the interpreter.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.configs import RunError

MEMORY = 1 << 29  # bytes of address space

CHILD = Path(__file__).with_name("sandboxed.py")


def passes(program: str, *, seconds: int = 5, memory: int = MEMORY) -> bool:
    """Run a program to its end.

    Args:
        program: Python source.
        seconds: of processor time; of the clock three times as many, for a busy machine.
        memory: bytes of address space.

    Returns:
        Whether it ended by itself and without an error, within the limits.

    Raises:
        RunError: this system has no such limits.
    """
    if os.name != "posix":
        raise RunError(f"generated programs run only under the limits of a POSIX system; this is {os.name}")
    word = secrets.token_hex(16)  # a program that ends early, with whatever exit status, has not said it
    source = program.encode(errors="replace")
    given = f"{seconds} {memory} {word} {len(source)}\n".encode() + source
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            # nothing of ours but where an interpreter of an unusual build finds its own library
            env={key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ},
            start_new_session=True,
        )
        try:
            said, _ = child.communicate(given, timeout=3 * seconds)
        except subprocess.TimeoutExpired:
            said = b""
        finally:
            if child.poll() is None:  # not reaped yet, so the number is still its own
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
    return said == word.encode()
