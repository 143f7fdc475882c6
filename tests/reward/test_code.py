"""The reward `code`: programs of completions against tests."""

import json
import os
import subprocess
import sys

import pytest

from gmpo.reward.code import Code, as_cases, program_in
from tests.reward.cases import assistant
from tests.reward.test_pool import workers_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its limits are of POSIX")

DOUBLE = "def double(x):\n    return 2 * x\n"
ASSERTS = "assert double(2) == 4\nassert double(0) == 0"


def network_can_be_cut():
    code = "from gmpo.reward.sandbox import cut_network; raise SystemExit(not cut_network())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


CUT = network_can_be_cut()
needs_isolation = pytest.mark.skipif(not CUT, reason="the network can't be cut here")


def block(program):
    return f"Here it is:\n```python\n{program}\n```\nDone."


def reward(program, tests, **settings):
    return Code(timeout_s=2.0, network=not CUT, **settings)([block(program)], [tests])[0]


CASES = [
    (DOUBLE, ASSERTS, 1.0),
    ("def double(x):\n    return x + 2\n", ASSERTS, 0.0),
    ("def double(x:", ASSERTS, 0.0),
    (DOUBLE + "if __name__ == '__main__':\n    input()", ASSERTS, 1.0),
    (DOUBLE + "import sys; sys.exit(0)", ASSERTS, 0.0),
    (DOUBLE + "import os; os._exit(0)", ASSERTS, 0.0),
    ("while True: pass", ASSERTS, 0.0),
    ("import time; time.sleep(1000)", ASSERTS, 0.0),
    ("held = []\nwhile True: held.append(b'x' * 2**24)", ASSERTS, 0.0),
    ("open('big', 'wb').write(b'x' * 2**26)\n" + DOUBLE, ASSERTS, 0.0),
    ("open('small', 'w').write('x')\n" + DOUBLE, ASSERTS, 1.0),
    ("print('noise')\n" + DOUBLE, ASSERTS, 1.0),
    ("print(int(input()) + 1)", [{"input": "1", "output": "2"}], 1.0),
    (
        "print(int(input()) + 1)",
        [{"input": "1", "output": "2\n"}, {"input": "1", "output": "3"}],
        0.0,
    ),
    ("print('a '); print('b')", [{"input": "", "output": "a\nb"}], 1.0),
    (DOUBLE, None, None),
    (DOUBLE, "", None),
    (DOUBLE, [], None),
]


@pytest.mark.parametrize(("program", "tests", "expected"), CASES)
def test_a_program_is_run_against_its_tests(program, tests, expected):
    assert reward(program, tests) == expected


def test_part_of_the_tests_can_count():
    tests = ["assert double(2) == 4", "assert double(2) == 5", "assert double(1) == 2"]
    assert reward(DOUBLE, tests) == 0.0
    assert reward(DOUBLE, tests, partial=True) == pytest.approx(2 / 3)
    assert reward(DOUBLE, json.dumps(tests), partial=True) == pytest.approx(2 / 3)


def test_the_last_block_of_the_answer_counts():
    assert program_in("```python\na = 1\n```\nor\n```\nb = 2\n```") == "b = 2\n"
    assert program_in("```json\n{}\n```") is None
    thought = f"<think>\n{block('wrong')}</think>\n{block(DOUBLE)}"
    code = Code(network=not CUT)
    assert code([thought, [assistant("no program")]], [ASSERTS, ASSERTS]) == [1.0, 0.0]
    assert code([f"{block(DOUBLE)}"], [ASSERTS], opened=["<think>\n"]) == [0.0]


@needs_isolation
def test_there_is_no_network():
    program = (
        "import socket\n"
        "def reaches():\n"
        "    try:\n"
        "        socket.create_connection(('127.0.0.1', PORT), timeout=1)\n"
        "        return True\n"
        "    except OSError:\n"
        "        return False\n"
    )
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        here = program.replace("PORT", str(server.getsockname()[1]))
        assert reward(here, "assert not reaches()") == 1.0
        assert Code(network=True)([block(here)], ["assert reaches()"]) == [1.0]


def test_what_a_program_started_ends_with_it():
    before = set(workers_of())
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(1000)\n"
        "    os._exit(0)\n"
    )
    assert reward(program + DOUBLE, ASSERTS) == 1.0
    assert set(workers_of()) <= before


def test_a_program_sees_none_of_our_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    tests = "import os\nassert 'HF_TOKEN' not in os.environ\nassert os.listdir('.') == []"
    assert reward(DOUBLE, tests) == 1.0


@pytest.mark.parametrize("tests", [[3], [{"input": "1"}], 5.0])
def test_tests_of_another_form_are_refused(tests):
    with pytest.raises((ValueError, TypeError)):
        as_cases(tests)
