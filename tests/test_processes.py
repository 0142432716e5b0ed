"""What is killed, or interrupted, ends with all that it started, within seconds."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import MARK, kill_tree, marked, run_to_end, wait_until

TESTS = Path(__file__).parent
QUICKSTART = [
    TESTS.parent / "examples" / "quickstart.py",
    "--finetune_steps",
    "0.02",
    "--rows",
    "64",
    "--max_steps",
    "1",
]
IN_TIME = 5  # seconds: it takes one or two, also where other tests want the cores

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are told apart by their environment")


@pytest.fixture
def started(tmp_path):
    """Starts a command whose output goes to a file: (process, file, mark of all that it starts)."""
    # a shell may have started the tests so that they ignore it, which what they start would inherit
    before, processes = signal.signal(signal.SIGINT, signal.default_int_handler), []

    def start(command, mark=None, **environment):
        file = tmp_path / "printed"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        environment.pop(MARK)
        if mark:
            environment[MARK] = mark
        with open(file, "w") as printed:
            command = [sys.executable, *map(str, command)]
            process = subprocess.Popen(command, env=environment, stdout=printed, stderr=subprocess.STDOUT)
        processes.append(process)
        return process, file

    yield start
    signal.signal(signal.SIGINT, before)
    for process in processes:
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()


def assert_ends(process, mark):
    process.wait(IN_TIME)
    assert wait_until(lambda: not marked(mark), IN_TIME), marked(mark)


def test_killed_tests(started, tmp_path):
    """Workers, and what they started in sessions of their own."""
    (tmp_path / "conftest.py").write_text("from processes import watch_over_children\nwatch_over_children()\n")
    (tmp_path / "test_it.py").write_text(
        "import subprocess, sys, time\n"
        "def test_it():\n"
        "    command = [sys.executable, '-c', 'import time; time.sleep(300)']\n"
        "    subprocess.Popen(command, start_new_session=True).wait()\n"
    )
    command = ["-m", "pytest", "-n", "2", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    process, _ = started(command, PYTHONPATH=str(TESTS))
    mark = str(process.pid)
    # two workers, the one that watches, and what the test starts
    assert wait_until(lambda: len(marked(mark)) == 4, 60), marked(mark)
    process.kill()
    assert_ends(process, mark)


def test_a_command_that_takes_too_long(tmp_path):
    sleep = "import time; time.sleep(300)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}], start_new_session=True)"
    environment = {**os.environ, MARK: str(tmp_path)}
    with pytest.raises(subprocess.TimeoutExpired):
        run_to_end([sys.executable, "-c", code], timeout=1, env=environment)
    assert wait_until(lambda: not marked(str(tmp_path)), IN_TIME)


@pytest.mark.parametrize(
    "moment, how",
    [("fine-tuning the experts", signal.SIGINT), ("in a fresh process", signal.SIGKILL)],
    ids=["interrupted", "killed"],
)
def test_quickstart(started, tmp_path, moment, how):
    """Also where it waits for a process that it started."""
    mark, flags = str(tmp_path), ["--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    process, printed = started([*QUICKSTART, *flags], mark)
    number = 2 if how == signal.SIGKILL else 1
    arrived = lambda: moment in printed.read_text() and len(marked(mark)) == number  # noqa: E731
    assert wait_until(arrived, 200), printed.read_text()[-4000:]
    process.send_signal(how)
    assert_ends(process, mark)


def test_a_launched_example_ends_with_its_launcher(started, tmp_path):
    flags = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", "--main_process_port", 0]
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(QUICKSTART[0].parent)!r})\nimport _common\n"
        "print('in the loop', flush=True)\ntime.sleep(300)\n"
    )
    mark = str(tmp_path)
    process, printed = started(["-m", "accelerate.commands.launch", *flags, script], mark, ACCELERATE_USE_CPU="true")
    assert wait_until(lambda: printed.read_text().count("in the loop") == 2, 100), printed.read_text()[-4000:]
    assert len(marked(mark)) >= 3
    process.kill()
    assert_ends(process, mark)
