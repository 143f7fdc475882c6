"""Real servers, started by `gmpo serve` on this machine, each in a process group of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil

START = 600.0  # seconds, on a busy machine
ENVIRONMENT = {
    # Else a helper of log-probs is compiled, which takes longer than a test.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork",  # else each process imports vLLM anew
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
QUICKLY = ("--enforce-eager", "--max-num-seqs", "16", "--distributed-executor-backend", "uni")


class Server:
    """A server for a model in `folder`; `start` may be called again after it was killed."""

    def __init__(self, folder, *arguments, port=None, environment=None):
        self.folder = Path(folder)
        self.port = port or free_port()
        self.command = [
            *(sys.executable, "-m", "gmpo.cli", "serve", str(folder), "--port", str(self.port)),
            *(*QUICKLY, *arguments),
        ]
        self.environment = {**os.environ, **ENVIRONMENT, **(environment or {})}
        self.process = None

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}"

    def launch(self):
        log = open(self.folder / "server.log", "ab")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )
        log.close()

    def start(self):
        self.launch()
        deadline = time.monotonic() + START
        while not self.healthy():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.5)
        return self

    def ensure(self):
        return self if self.process is not None and self.healthy() else self.restart()

    def restart(self):
        self.kill()
        return self.start()

    def healthy(self):
        try:
            return urllib.request.urlopen(f"{self.address}/health", timeout=5).status == 200
        except OSError:
            return False

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def kill_engine(self):
        """End the process that computes, not the one that listens, as where memory runs out."""
        (engine,) = [
            p
            for p in psutil.Process(self.process.pid).children(recursive=True)
            if "EngineCore" in p.name()
        ]
        engine.kill()

    def kill(self):
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def log(self):
        return (self.folder / "server.log").read_text(errors="replace")[-3000:]


class PlainServer(Server):
    """vLLM's server as vLLM starts it, which nobody can give weights."""

    def __init__(self, folder):
        super().__init__(folder)
        options = ("--model", str(folder), "--port", str(self.port), "--dtype", "float32", *QUICKLY)
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]
