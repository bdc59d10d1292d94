"""Fresh processes to measure in: what one model leaves of the heap changes the times of the next."""

from __future__ import annotations

import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from zipformer_kernels.bench.job import Prepared
    from zipformer_kernels.bench.timing import Run

Answer = TypeVar("Answer")

PAUSE = 0.05  # seconds until another process's OpenMP threads, which spin after a loop, have gone to sleep


def quieten() -> None:
    """Silences, in this process, what upstream logs and what the compiler warns of."""
    logging.getLogger().setLevel(logging.ERROR)  # upstream logs its clipping
    warnings.filterwarnings("ignore", module="torch._dynamo")  # compiled upstream draws random numbers in Python


def fresh() -> ProcessPoolExecutor:
    """An executor of one fresh process."""
    context = multiprocessing.get_context("spawn")  # forked ones would have lost OpenMP's threads
    return ProcessPoolExecutor(1, mp_context=context, initializer=quieten)


class Apart:
    """The function of one peer of a job, in a process where there is nothing else.

    Args:
        prepare: the job's, which must pickle.
        peer: which peer.
    """

    def __init__(self, prepare: Callable[[Sequence[str]], Prepared], peer: str) -> None:
        self._process = fresh()
        try:
            self._process.submit(_hold, prepare, peer).result()
        except BaseException:
            self._process.shutdown()
            raise

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def __call__(self) -> None:
        """Calls the function; its result stays in the process."""
        self.tell(_call)

    def tell(self, question: Callable[[Run], Answer]) -> Answer:
        """What the question says of the function, asked in the process after a pause."""
        time.sleep(PAUSE)
        return self._process.submit(_answer, question).result()


def ask(question: Callable[[Run], Answer], run: Run) -> Answer:
    """question(run), asked in the process where the function is."""
    return run.tell(question) if isinstance(run, Apart) else question(run)


_held: dict[str, Any] = {}  # in a process of `Apart`


def _hold(prepare: Callable[[Sequence[str]], Prepared], peer: str) -> None:
    _held["run"] = prepare((peer,)).runs[peer]


def _answer(question: Callable[[Run], Any]) -> Any:
    return question(_held["run"])


def _call(run: Run) -> None:
    run()
