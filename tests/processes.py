"""Processes that the tests start, none of which outlives the test, or the tests' own process however that ends.

Run by itself, `python tests/processes.py`, it is the process that sees to the latter: it waits until its parent is gone
and kills whatever was started with the parent's mark in the environment.
"""

import os
import subprocess
import sys
import time

import psutil

MARK = "PEFT_TINT_TESTS"


def watch_over_children() -> None:
    """What this process starts from now on, and what that starts, is killed once this process is gone."""
    if MARK not in os.environ and os.name == "posix":  # with a mark it is itself one of those
        os.environ[MARK] = str(os.getpid())
        os.posix_spawn(sys.executable, [sys.executable, __file__], os.environ, setsid=True)


def run_to_end(command, timeout=300, **settings) -> str:
    """What a command prints. AssertionError if it fails, and if it takes too long, when all that it started is killed:
    torchrun's processes are in sessions of their own."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **settings}
    with subprocess.Popen(list(map(str, command)), **settings) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except BaseException:
            kill_tree(process.pid)
            raise
    assert process.returncode == 0, error[-4000:]
    return out


def kill_tree(pid) -> None:
    process = psutil.Process(pid)
    for one in [*process.children(recursive=True), process]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass


def marked(value) -> list[psutil.Process]:
    """The running processes beside this one that were started with this mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == value:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def wait_until(condition, seconds) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def main():
    parent, value = os.getppid(), os.environ[MARK]
    while os.getppid() == parent and str(parent) == value:
        time.sleep(0.5)
    while processes := marked(value):
        for process in processes:
            process.kill()
        time.sleep(0.1)


if __name__ == "__main__":
    main()
