"""Jobs in forked processes: the same results as in threads, and every way in which a worker can fail."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from holdfast.errors import UserError
from holdfast.merge import processes
from holdfast.merge.processes import BATCH, run_tasks


@pytest.fixture(params=["processes", "threads"])
def kind(request, monkeypatch):
    monkeypatch.setattr(processes, "can_fork", lambda: request.param == "processes")
    return request.param


def test_every_task_is_done_once_and_its_result_received(kind):
    tasks = [lambda scratch, n=n: [n, os.getpid()] for n in range(20 * BATCH)]  # more than a pipe holds
    found = {}

    def receive(index, result):
        assert index not in found
        found[index] = result

    run_tasks(tasks, 3, receive)
    assert [found[n][0] for n in range(len(tasks))] == list(range(len(tasks)))
    assert (os.getpid() in {process for _, process in found.values()}) == (kind == "threads")


def test_results_longer_than_a_pipe_arrive_whole(kind):
    received = []
    run_tasks([lambda scratch: "x" * 300_000] * 4, 2, lambda index, result: received.append(len(result)))
    assert received == [300_000] * 4


def failing(error):
    def run(scratch):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (UserError("tensor 'w' holds NaN"), UserError, "tensor 'w' holds NaN"),
        (OSError(28, "No space left on device", "out"), OSError, "No space left"),
        (KeyError("lost"), (KeyError, RuntimeError), "lost"),
    ],
)
def test_the_first_error_stops_the_rest(kind, error, expected, text):
    done = []
    tasks = [failing(error), *[lambda scratch: time.sleep(0.01)] * 1000]
    with pytest.raises(expected, match=text) as caught:
        run_tasks(tasks, 2, lambda index, result: done.append(index))
    assert len(done) < 500
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (28, "out")


def test_a_killed_worker_is_an_error_and_the_others_finish(monkeypatch):
    monkeypatch.setattr(processes, "can_fork", lambda: True)
    done = []
    tasks = [lambda scratch, n=n: os.kill(os.getpid(), signal.SIGKILL) if n == 3 else n for n in range(10)]
    with pytest.raises(ChildProcessError, match="1 of 10 jobs were not done"):
        run_tasks(tasks, 2, lambda index, result: done.append(result))
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_when_all_workers_are_killed_it_does_not_hang(monkeypatch):
    monkeypatch.setattr(processes, "can_fork", lambda: True)
    with pytest.raises(ChildProcessError, match="killed"):
        run_tasks([lambda scratch: os.kill(os.getpid(), signal.SIGKILL)] * 30 * BATCH, 2, lambda *_: None)


def test_no_pipe_and_no_process_is_left(monkeypatch):
    monkeypatch.setattr(processes, "can_fork", lambda: True)
    before = set(Path("/proc/self/fd").iterdir())
    run_tasks([lambda scratch: None] * 10, 3, lambda *_: None)
    with pytest.raises(UserError):
        run_tasks([failing(UserError("no"))] * 10, 3, lambda *_: None)
    assert set(Path("/proc/self/fd").iterdir()) == before
    with pytest.raises(ChildProcessError):  # no child to wait for
        os.waitpid(-1, os.WNOHANG)


def test_ctrl_c_ends_the_workers(monkeypatch):
    monkeypatch.setattr(processes, "can_fork", lambda: True)
    pids = []
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_tasks(
            [lambda scratch, n=n: [os.getpid(), time.sleep(0.05 if n < 2 else 60)][0] for n in range(4)],
            2,
            lambda index, result: pids.append(result),
        )
    assert time.monotonic() - started < 20
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
