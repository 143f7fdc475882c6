"""A reward that harms its process, in each of the ways that there are.  Imports nothing heavy."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time

HARMED = "harmed"
PROCESS = "which process?"


def python_loop():
    while True:
        pass


def regular_expression():
    re.match(r"(a+)+$", "a" * 64 + "b")


def sleep():
    time.sleep(10**6)


def sleep_in_c():
    ctypes.CDLL(None).sleep(10**6)


def big_integer():
    return 9 ** (9**9)


def lock():
    threading.Lock().__enter__()
    own = threading.Lock()
    own.acquire()
    own.acquire()


def loop_in_c():
    """A sum over an endless iterator runs in C, and looks at no signal."""
    import itertools

    sum(itertools.repeat(0))


def deaf_loop():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def asks_the_user():
    input()


def exits():
    sys.exit(7)


def exits_at_once():
    os._exit(7)


def kills_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def kills_its_group():
    os.killpg(0, signal.SIGKILL)


def aborts():
    os.abort()


def segfaults():
    ctypes.string_at(0)


def closes_everything():
    os.closerange(0, 256)


def closes_stdout():
    os.close(1)
    os.close(2)
    sys.stdout.close()
    sys.stderr.close()
    raise OSError("nothing to write to")


def recursion():
    sys.setrecursionlimit(10**9)

    def deeper():
        return deeper()

    deeper()


def exception():
    raise ValueError("as it happens")


def interrupt():
    raise KeyboardInterrupt


class Unpicklable(Exception):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __str__(self):
        raise TypeError("not even text")


def unpicklable_exception():
    raise Unpicklable


def memory_at_once():
    held = bytearray(2**34)
    held[::4096] = b"x" * len(held[::4096])


def memory_bit_by_bit():
    held = []
    while True:
        held.append(b"x" * 2**24)


def memory_of_a_child():
    code = "held = []\nwhile True: held.append(b'x' * 2**24)"
    subprocess.run([sys.executable, "-c", code])


def fork_that_hangs():
    if os.fork() == 0:
        time.sleep(10**6)
    os.wait()


def daemon_left_behind():
    """Two forks and a session apart, and then it hangs."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(10**6)
        os._exit(0)
    time.sleep(10**6)


def endless_answer():
    while True:
        yield 1.0


def long_text():
    return "x" * 10**8


def wrong_answer():
    return [1.0, 2.0]


def not_a_number():
    return [float("inf")]


VICIOUS = {
    case.__name__: case
    for case in (
        python_loop,
        regular_expression,
        sleep,
        sleep_in_c,
        big_integer,
        lock,
        loop_in_c,
        deaf_loop,
        stopped,
        asks_the_user,
        exits,
        exits_at_once,
        kills_itself,
        kills_its_group,
        aborts,
        segfaults,
        closes_everything,
        closes_stdout,
        recursion,
        exception,
        interrupt,
        unpicklable_exception,
        memory_at_once,
        memory_bit_by_bit,
        memory_of_a_child,
        fork_that_hangs,
        daemon_left_behind,
        endless_answer,
        long_text,
        wrong_answer,
        not_a_number,
    )
}


def short_sleep():
    time.sleep(1.5)
    return [1.0]


def some_memory():
    held = b"x" * 2**29
    time.sleep(0.5)
    return [float(held[:1] == b"x")]


def vicious(completions, answer):
    """The length of a completion, but for the one that does harm."""
    (completion,) = completions
    if completion == PROCESS:
        return [float(os.getpid())]
    if completion == HARMED:
        return {**VICIOUS, "short_sleep": short_sleep, "some_memory": some_memory}[answer[0]]()
    return [float(len(completion))]


def hangs_now_and_then(completion_ids):
    """The sum of a completion's tokens, which takes for ever where it is a multiple of three."""
    total = sum(completion_ids[0])
    if total % 3 == 0:
        sleep()
    return [float(total)]
