"""Daemon threads: a process that ends for another reason doesn't wait for a store that doesn't answer.

(`concurrent.futures` joins its threads at the interpreter's end, for as long as their reads are retried.)
"""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_S = 5.0
"""Longest wait for a thread at an orderly end."""


class DaemonPool:
    """As much of a ThreadPoolExecutor as the loader needs; calls begin in the order in which they were submitted."""

    def __init__(self, threads: int, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        self._closed = False
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future

    def close(self) -> None:
        """Ends the threads after the calls that they are in; the others are forgotten."""
        self._closed = True
        for _ in self._threads:
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None and not self._closed:
            call()


def in_background(make: Callable[[], Iterator[T]], depth: int) -> Iterator[T]:
    """Runs an iterator in a thread, up to `depth` items ahead, the one being made included.

    Its errors are raised here. Closing the generator ends the thread.
    """
    items: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    stop = threading.Event()

    def work() -> None:
        source = make()
        try:
            while room.acquire() and not stop.is_set():
                items.put((next(source), None))
        except BaseException as error:
            items.put((None, error))
        finally:
            source.close()  # type: ignore[attr-defined]

    thread = threading.Thread(target=work, name="data-batches", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            room.release()
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
            del item  # or it stays in memory until the next is there
    finally:
        stop.set()
        room.release()
        thread.join(CLOSE_S)
