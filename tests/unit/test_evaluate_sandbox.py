"""The sandbox keeps accidents in; pass@k is the unbiased estimate."""

from __future__ import annotations

from itertools import combinations

import pytest

from holdfast.errors import UserError
from holdfast.evaluate.generate import cut, extract_answer, matches
from holdfast.evaluate.sandbox import Sandbox, pass_at_k

PROGRAMS = {
    "assert 1 == 2": "AssertionError",
    "while True: pass": "stopped after",
    "import time; time.sleep(60)": "stopped after",
    "import socket; socket.socket()": "refused",
    "import subprocess; subprocess.run(['true'])": "refused",
    "import os; os.system('true')": "refused",
    "import os; os.fork()": "refused",
    "x = bytearray(4 << 30)": "MemoryError",
    "open('f', 'wb').write(b'x' * (4 << 20))": "File too large",
    "import sys; sys.exit(0)": "exited before",
    "import os; os._exit(0)": "exit status 0",
    "def broken(:": "SyntaxError",
}


@pytest.mark.parametrize(("program", "message"), PROGRAMS.items())
def test_what_goes_wrong_is_stopped_and_named(program: str, message: str) -> None:
    assert message in Sandbox(seconds=4.0 if "while" not in program and "sleep" not in program else 0.6).run(program)


def test_a_good_program_passes_without_the_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert Sandbox().run("import os, math\nassert 'SECRET' not in os.environ\nassert os.listdir('.')\n") == ""


def test_pass_at_k_is_the_mean_over_subsets() -> None:
    passed, samples = [0, 2, 5], 5
    for k in (1, 2, 5):
        expected = 0.0
        for count in passed:
            outcomes = [i < count for i in range(samples)]
            subsets = list(combinations(outcomes, k))
            expected += sum(any(s) for s in subsets) / len(subsets) / len(passed)
        assert pass_at_k(passed, samples, k) == pytest.approx(expected)
    with pytest.raises(UserError):
        pass_at_k([1], 2, 3)


def test_answers() -> None:
    number = r"(-?\$?\d[\d,]*(?:\.\d+)?)"
    assert extract_answer("3 + 4 = 7, so $1,000.", number) == "$1,000"
    assert extract_answer("none", number) == ""
    assert matches("numeric_match", "$1,000", "1000.0")
    assert not matches("numeric_match", "", "0")
    assert not matches("exact_match", "7.0", "7")
    assert cut("a\nb.c", ["\n", "."]) == "a"
