"""Who does tasks that do not depend on each other: threads of this process, or processes elsewhere.

Whoever it is, a task runs with as many CPU threads as torch has where it is asked for, so its bits are the same.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from threading import Event
from typing import Protocol, TypeVar

import torch

from .compute import ahead, as_made

A = TypeVar("A")
K = TypeVar("K")
T = TypeVar("T")

NONE = "0"  # of the setting `workers`
Report = Callable[..., None]  # a task's progress: (units done, name=value, ...)
# (an item, what to call while it is at work) -> a result. It can be pickled, and so can item and result.
Task = Callable[[A, Report], T]


class Workers(Protocol):
    """Close a generator that is not used up, as by `contextlib.closing`: it ends the tasks that are still at work."""

    def as_made(
        self, task: Task[A, T], items: Mapping[K, A], at_once: int, report: Report
    ) -> Generator[tuple[K, T], None, None]:
        """The key of each item with its result, as they are done; so many `at_once` if it is by threads."""

    def in_order(self, task: Task[A, T], items: Iterable[A], at_once: int = 1) -> Generator[tuple[A, T], None, None]:
        """Each item with its result, in their order; some may be made ahead of their use, if it is by two threads."""


class Threads:
    """This process."""

    def as_made(
        self, task: Task[A, T], items: Mapping[K, A], at_once: int, report: Report
    ) -> Generator[tuple[K, T], None, None]:
        def one(key: K, over: Event) -> T:
            def heard(units: int, **values: float) -> None:
                if over.is_set():
                    raise InterruptedError("another task has failed, or the run was interrupted")
                report(units, **values)

            return task(items[key], heard)

        return as_made(one, items, at_once)

    def in_order(self, task: Task[A, T], items: Iterable[A], at_once: int = 1) -> Generator[tuple[A, T], None, None]:
        made: Iterator[tuple[A, T]] = ((item, task(item, silent)) for item in items)
        yield from ahead(made) if at_once == 2 else made


def silent(units: int, **values: float) -> None:
    """Nothing is said."""


@contextmanager
def hired(count: str, address: str, device: torch.device) -> Iterator[Workers]:
    """By the settings `workers` and `ray-address`: Ray's side lies beside the package, which does without Ray.

    Tasks are on `device`, which each of the workers has.

    Raises:
        RunError: no Ray can be had at the address.
    """
    if count == NONE:
        yield Threads()
    else:
        with import_module("fedmitr_ray.workers").hired(count, address, device) as workers:
            yield workers
