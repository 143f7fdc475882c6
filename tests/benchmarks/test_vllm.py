"""What the benchmark of the engines leaves behind."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

CHILD = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
PROGRAM = f"""
import subprocess, sys
from benchmarks.vllm import end_with_parent
subprocess.run([sys.executable, "-c", {CHILD!r}], start_new_session=True, preexec_fn=end_with_parent)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_child_ends_with_the_benchmark_that_started_it(number):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True
    ) as benchmark:
        child = int(benchmark.stdout.readline())
        benchmark.send_signal(number)
        try:
            rest, _ = benchmark.communicate(
                timeout=30
            )  # returns once nobody holds the pipe: both have ended
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    assert rest == ""
    assert benchmark.returncode == -number
