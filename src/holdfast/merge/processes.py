"""Jobs on all cores, in forked processes where that is safe and in threads elsewhere.

Threads that call numpy on stretches small enough for the cache wait for the interpreter lock about as long as they
compute: two of them merged 1.4 times as much as one, two processes 2.0 times (measured on two cores).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import selectors
import signal
import struct
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, NoReturn

from holdfast.errors import UserError
from holdfast.merge.scratch import Scratch, run_jobs

Task = Callable[[Scratch], Any]  # its result must survive JSON
Receive = Callable[[int, Any], None]
NUMBER = struct.Struct("<I")
BATCH = 1024  # job numbers written at once: 4 KiB, which a pipe takes as a whole or not at all
PR_SET_PDEATHSIG = 1


def can_fork() -> bool:
    """Linux, and no torch in this process, whose own threads and devices a fork would cut in two."""
    return sys.platform == "linux" and "torch" not in sys.modules


def run_tasks(tasks: Sequence[Task], workers: int, receive: Receive) -> None:
    """Run tasks, started in their order; ``receive(index, result)`` is called for each, one at a time.

    The first error stops the rest and is raised: a ``UserError`` or ``OSError`` as itself, whatever else a process met
    as ``RuntimeError`` with its traceback. A process that was killed is a ``ChildProcessError``.
    """
    if workers > 1 and len(tasks) > 1 and can_fork():
        _in_processes(tasks, min(workers, len(tasks)), receive)
        return
    lock = threading.Lock()

    def job(index: int, task: Task) -> Callable[[Scratch], None]:
        def run(scratch: Scratch) -> None:
            result = task(scratch)
            with lock:
                receive(index, result)

        return run

    run_jobs([job(index, task) for index, task in enumerate(tasks)], workers)


def _in_processes(tasks: Sequence[Task], workers: int, receive: Receive) -> None:
    """Every process takes its next job number from one pipe and answers through a pipe of its own."""
    libc, crew = ctypes.CDLL(None), dict[int, int]()  # result pipe -> process
    queue_out, queue_in = (os.fdopen(end, mode, buffering=0) for end, mode in zip(os.pipe(), ("rb", "wb")))
    with queue_out, queue_in:
        try:
            for _ in range(workers):
                results, answer = os.pipe()
                process = _fork()
                if not process:
                    queue_in.close()
                    for end in (*crew, results):  # an open end here would hide from the others that the parent died
                        os.close(end)
                    _work(tasks, queue_out, answer, libc)
                os.close(answer)
                crew[results] = process
            queue_out.close()
            _lead(len(tasks), queue_in, crew, receive)
        finally:
            for results, process in crew.items():
                os.close(results)
                os.kill(process, signal.SIGKILL)  # after an error or Ctrl-C; those that are done don't notice
                os.waitpid(process, 0)


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a progress bar's thread is no danger to the child
        return os.fork()


def _lead(count: int, queue: IO[bytes], crew: Iterable[int], receive: Receive) -> None:
    """Feed the queue, collect the results, until every process has closed its pipe."""
    os.set_blocking(queue.fileno(), False)
    numbers, missing = iter(range(count)), count
    batch = _batch(numbers)
    unread = dict.fromkeys(crew, b"")
    with selectors.DefaultSelector() as ready:
        ready.register(queue, selectors.EVENT_WRITE)
        for results in unread:
            ready.register(results, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select():
                if key.fileobj is queue:
                    batch = _feed(queue, batch, numbers)
                    if not batch:
                        ready.unregister(queue)
                        queue.close()
                    continue
                found = os.read(key.fd, 1 << 16)
                if not found:
                    ready.unregister(key.fd)
                *messages, unread[key.fd] = _split(unread[key.fd] + found)
                for message in messages:
                    answer = json.loads(message)
                    _raise_error(answer)
                    receive(answer["job"], answer["result"])
                    missing -= 1
    if missing:
        raise ChildProcessError(
            f"{missing} of {count} jobs were not done: a worker process was killed, perhaps for lack of memory. What "
            "was done is kept; run the same command again, with fewer --threads."
        )


def _feed(queue: IO[bytes], batch: bytes, numbers: Iterator[int]) -> bytes:
    """Write a batch if the pipe has room; the next batch, or nothing if there is none or nobody reads any more."""
    try:
        return batch if queue.write(batch) is None else _batch(numbers)
    except BrokenPipeError:
        return b""


def _batch(numbers: Iterator[int]) -> bytes:
    return b"".join(NUMBER.pack(number) for number in itertools.islice(numbers, BATCH))


def _split(data: bytes) -> list[bytes]:
    """Whole messages (length, then JSON), and last what is left."""
    messages = []
    while len(data) >= NUMBER.size and len(data) >= (end := NUMBER.size + NUMBER.unpack_from(data)[0]):
        messages.append(data[NUMBER.size : end])
        data = data[end:]
    return [*messages, data]


def _raise_error(answer: dict[str, Any]) -> None:
    if "user" in answer:
        raise UserError(answer["user"])
    if "system" in answer:
        raise OSError(*answer["system"])
    if "other" in answer:
        raise RuntimeError(f"a worker process failed:\n{answer['other']}")


def _work(tasks: Sequence[Task], queue: IO[bytes], answer: int, libc: ctypes.CDLL) -> NoReturn:
    """A worker's life; it ends without the parent's exit handlers and buffers."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        gc.disable()  # collecting would copy the parent's pages
        scratch = Scratch()
        while data := queue.read(NUMBER.size):
            (number,) = NUMBER.unpack(data)
            _send(answer, {"job": number, "result": tasks[number](scratch)})
    except BaseException as error:
        with contextlib.suppress(OSError):
            _send(answer, _described(error))
    finally:
        os._exit(0)


def _described(error: BaseException) -> dict[str, Any]:
    if isinstance(error, UserError):
        return {"user": str(error)}
    if isinstance(error, OSError) and error.errno is not None:
        return {"system": [error.errno, error.strerror, *([str(error.filename)] if error.filename else [])]}
    return {"other": "".join(traceback.format_exception(error))}


def _send(pipe: int, message: dict[str, Any]) -> None:
    text = json.dumps(message).encode()
    data = memoryview(NUMBER.pack(len(text)) + text)
    while data:
        data = data[os.write(pipe, data) :]
