"""Run one program of a completion: this file is the main module of its process.

It limits itself before it runs a line of the program.  It imports nothing of gmpo.
"""

import contextlib
import json
import math
import os
import sys

NO_NETWORK_ISOLATION = 97  # the exit status if the network can't be cut
_FILE_BYTES = 16 * 2**20
_OPEN_FILES = 64
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # flags of Linux's unshare


def main(path: str) -> None:
    """Run the job in the JSON file `path`.

    The program is module "solution" if tests follow, which run in its namespace, and the main
    module if it only reads stdin and writes stdout.
    """
    with open(path, encoding="utf-8") as file:
        job = json.load(file)
    os.unlink(path)

    limit(job["cpu_s"], job["memory_bytes"])
    if not job["network"] and not cut_network():
        os._exit(NO_NETWORK_ISOLATION)

    tests = job["tests"]
    namespace = {"__name__": "__main__" if tests is None else "solution"}
    sys.argv = ["solution.py"]
    exec(compile(job["program"], "solution.py", "exec"), namespace)
    if tests is None:
        return

    # A program that ends the process before its tests have run must not pass them.
    exec(compile(tests, "tests.py", "exec"), namespace)
    sys.stdout.flush()
    os.write(1, job["passed"].encode())


def limit(cpu_s: float, memory_bytes: int) -> None:
    """Limit CPU time, memory and files of this process and of each that it starts."""
    import resource

    limits = {
        resource.RLIMIT_CPU: math.ceil(cpu_s),
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses some
            resource.setrlimit(name, (value, value))


def cut_network() -> bool:
    """Move this process where there is no network but an unconnected loopback (Linux only)."""
    import ctypes

    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.unshare(_NEW_USER | _NEW_NETWORK) == 0 or libc.unshare(_NEW_NETWORK) == 0


if __name__ == "__main__":
    main(sys.argv[1])
