"""Fresh processes to measure in: what one model leaves of the heap changes the times of the next.

And what breaks in one, a crash, a device's context or the memory's end, ends that process only.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from benchmarks.harness.peers import Prepared, Run, Told, Unserved, told

Answer = TypeVar("Answer")

PAUSE = 0.05  # seconds until another process's OpenMP threads, which spin after a loop, have gone to sleep
PATIENCE = 20.0  # seconds for a process to end by itself


class Failed(Told):
    """A call raised something in another process; the message is what `peers.told` says of it."""


class Died(Told):
    """A process ended in the middle of a call."""


def quieten() -> None:
    """Silences, in this process, what upstream logs and what the compiler warns of."""
    logging.getLogger().setLevel(logging.ERROR)  # upstream logs its clipping
    warnings.filterwarnings("ignore", module="torch._dynamo")  # compiled upstream draws random numbers in Python


class Worker:
    """A fresh process that makes one call at a time. It ends with the block, and with the process that started it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # forked ones would have lost OpenMP's threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end(at_once=kind is not None)

    def end(self, at_once: bool = False) -> None:
        """Ends the process, which is given time to end by itself, or not."""
        self._pipe.close()
        if not at_once:
            self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()

    def call(self, function: Callable[..., Answer], *args: Any) -> Answer:
        """function(*args), made there. All of it must pickle.

        Raises:
            Failed: the function raised something.
            Died: the process ended.
        """
        try:
            self._pipe.send_bytes(pickle.dumps((function, args)))
            worked, answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise Died(ending(self._process.exitcode)) from error
        if not worked:
            raise Failed(answer)
        return answer


def ending(code: int | None) -> str:
    """How a process ended, by its exit code."""
    if code == -signal.SIGKILL:
        return "its process was killed, as systems do when memory runs out"
    if code is not None and code < 0:
        return f"its process died of {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _serve(pipe: Connection) -> None:
    """What a worker's process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it gets it too, and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quieten()
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            return
        try:
            function, args = pickle.loads(request)
            answer = pickle.dumps((True, function(*args)))
        except Exception as error:
            answer = pickle.dumps((False, told(error)))
        pipe.send_bytes(answer)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class Apart:
    """The function of one peer of a job, in a process where there is nothing else.

    Args:
        prepare: the job's, which must pickle.
        peer: which peer.
    Raises:
        Failed: it could not be made ready.
        Died: its process ended.
    """

    def __init__(self, prepare: Callable[[Sequence[str]], Prepared], peer: str) -> None:
        self._worker = Worker()
        try:
            self._worker.call(_hold, prepare, peer)
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._worker.end(at_once=kind is not None)

    def end(self) -> None:
        """Ends the process now."""
        self._worker.end(at_once=True)

    def __call__(self) -> None:
        """Calls the function; its result stays in the process."""
        self.tell(_call)

    def tell(self, question: Callable[[Run], Answer]) -> Answer:
        """What the question says of the function, asked in the process after a pause. Raises `Failed` and `Died`."""
        time.sleep(PAUSE)
        return self._worker.call(_answer, question)


def ask(question: Callable[[Run], Answer], run: Run) -> Answer:
    """question(run), asked in the process where the function is."""
    return run.tell(question) if isinstance(run, Apart) else question(run)


def end(run: Run) -> None:
    """Ends the process where the function is, if it has one of its own."""
    if isinstance(run, Apart):
        run.end()


_held: dict[str, Any] = {}  # in a process of `Apart`


def _hold(prepare: Callable[[Sequence[str]], Prepared], peer: str) -> None:
    prepared = prepare((peer,))
    for reasons in (prepared.skipped, prepared.failed, prepared.wrong):
        if peer in reasons:
            raise Unserved(reasons[peer])
    _held["run"] = prepared.runs[peer]


def _answer(question: Callable[[Run], Any]) -> Any:
    return question(_held["run"])


def _call(run: Run) -> None:
    run()
