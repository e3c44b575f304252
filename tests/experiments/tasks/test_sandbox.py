import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.configs import RunError
from experiments.tasks import sandbox
from experiments.tasks.sandbox import passes
from experiments.tasks.sandboxed import CALLS

PASSING = """
import collections, heapq, itertools, math, random, re, typing
assert math.gcd(6, 4) == 2 and random.random() < 1
print("x" * 10**6)
"""


def test_a_passing_program():
    assert passes(PASSING)
    assert passes("s = 'é\\n'\nassert len(s) == 2")


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "def f(:",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "import sys; sys.exit()",
    ],
)
def test_a_failing_program_and_one_that_leaves_early(program):
    assert not passes(program)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_a_looping_or_sleeping_program_is_ended_in_time(program):
    start = time.monotonic()
    assert not passes(program, seconds=1)
    assert time.monotonic() - start < 10


def test_a_memory_hungry_program():
    hungry = "held = bytearray({} << 20)"
    assert passes(hungry.format(50))
    assert not passes(hungry.format(4_000))


@pytest.fixture
def victim():
    """A process that may be killed: a test that aimed at its own would not live to fail."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "attempt",
    [
        "os.kill({pid}, 9)",
        "__import__('posix').kill({pid}, 15)",
        "os.killpg(os.getpgid({pid}), 0)",
        "signal.pidfd_send_signal(os.pidfd_open({pid}), 9)",
    ],
)
def test_a_program_that_kills_others_kills_nobody(attempt, victim):
    attempt = attempt.format(pid=victim.pid)
    refused = "except (PermissionError, AttributeError):\n    pass\nelse:\n    1 / 0"
    assert passes(f"import os, signal\ntry:\n    {attempt}\n{refused}")
    assert not passes(f"import os, signal\n{attempt}")
    assert victim.poll() is None
    if "killpg" not in attempt:  # the control: outside the sandbox the same line does it
        exec(f"import os, signal\n{attempt}")
        assert victim.wait(10) != 0


@pytest.mark.parametrize(
    "attempt",
    [
        "open('x', 'w')",
        "open({path!r}, 'a').write('x')",
        "__import__('os').open('x', 65)",
        "__import__('os').remove({path!r})",
        "__import__('os').rename({path!r}, 'x')",
        "__import__('os').mkdir('x')",
        "__import__('shutil').rmtree({folder!r})",
        "__import__('os').system('true')",
        "__import__('os').fork()",
        "__import__('subprocess').run(['true'])",
        "__import__('socket').socket().connect(('127.0.0.1', 9))",
        "__import__('ctypes')",
        "__import__('resource').setrlimit(0, (-1, -1))",
    ],
)
def test_writing_removing_processes_and_foreign_code_are_refused(attempt, tmp_path):
    path = tmp_path / "kept"
    path.write_text("kept")
    attempt = attempt.format(path=str(path), folder=str(tmp_path))
    assert not passes(attempt)
    assert passes(f"try:\n    {attempt}\nexcept (PermissionError, ImportError):\n    pass\nelse:\n    1 / 0")
    assert path.read_text() == "kept"


def test_reading_is_allowed_and_the_environment_is_not_ours(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert passes(
        "import os\nassert 'SECRET' not in os.environ\nassert os.listdir('.') == []\nopen(os.devnull).read()"
    )
    assert passes("import sys\nassert not any('site-packages' in p for p in sys.path)")


@pytest.mark.skipif(platform.machine() not in CALLS or sys.platform != "linux", reason="no filter known here")
def test_the_kernels_filter_is_on():
    assert passes("assert 'Seccomp:\\t2' in open('/proc/self/status').read()")
    assert "Seccomp:\t2" not in Path("/proc/self/status").read_text()


def test_another_system_is_named(monkeypatch):
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(RunError, match="only under the limits of a POSIX system; this is nt"):
        passes("1")
