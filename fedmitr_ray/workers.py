"""Tasks of the server phase as Ray's, with the settings' limit on how many are at work at once."""

import logging
import os
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from fedmitr_flwr.common.compute import usable_cores
from fedmitr_flwr.common.errors import RunError
from fedmitr_flwr.common.fingerprint import core
from fedmitr_flwr.common.provenance import versions
from fedmitr_flwr.common.shipped import PACKAGE
from fedmitr_flwr.common.workers import Report, Task, silent
from fedmitr_flwr.uploads.stored import StoredWeights

A = TypeVar("A")
K = TypeVar("K")
T = TypeVar("T")

log = logging.getLogger("fedmitr")

AUTO = "auto"
RETRIES = 3  # of a task whose worker died
WAIT = 120.0  # seconds for the Ray of Flower's simulation, which starts beside the ServerApp


@contextmanager
def hired(count: str, address: str, device: torch.device) -> Iterator["RayWorkers"]:
    """Workers of the Ray that this process is connected to, of the cluster at `address`, or of a Ray of its own.

    Raises:
        RunError: there is none at the address, or it has no GPU where the device is one.
    """
    if ray.is_initialized():
        if address:
            log.warning("ray-address = %r is not used: this process has a Ray already, as Flower simulates", address)
        yield RayWorkers(count, device, guest=True)
        return
    for quiet in ("RAY_USAGE_STATS_ENABLED", "RAY_COLOR_PREFIX", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        os.environ.setdefault(quiet, "0")  # no statistics sent, no escapes, no advice on versions to come
    own: dict[str, Any] = {"include_dashboard": False}
    own["num_cpus"] = usable_cores() if count == AUTO else int(count) * torch.get_num_threads()
    try:
        ray.init(logging_level="warning", **{"address": address} if address else own)
    except Exception as error:  # Ray's own are of no type
        where = f"ray-address = {address!r}" if address else "workers"
        raise RunError(f"{where}: no Ray is to be had ({error}); see `ray status`, docs/performance.md") from error
    try:
        yield RayWorkers(count, device)
    finally:
        ray.shutdown()


def await_simulation() -> None:
    """Wait until Flower's simulation, in this very process, has started its Ray: two at once are not possible."""
    until = time.monotonic() + WAIT
    while not ray.is_initialized() and time.monotonic() < until:
        time.sleep(0.1)


class RayWorkers:
    """`common.workers.Workers` by Ray."""

    def __init__(self, count: str, device: torch.device, *, guest: bool = False) -> None:
        """As a guest, no CPUs are asked for: Flower's simulated clients hold all of them, and rest by now."""
        self.count, self.device, self.guest = count, device, guest
        ray.util.register_serializer(StoredWeights, serializer=dict, deserializer=lambda tensors: tensors)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # where code lies elsewhere, too
        self._remote = ray.remote(_work)

    def as_made(
        self, task: Task[A, T], items: Mapping[K, A], at_once: int, report: Report
    ) -> Generator[tuple[K, T], None, None]:
        """The key of each item with its result, as they are done. `report` gets all of a task's once it is done."""
        del at_once  # of this machine
        yield from self._results(task, items.items(), report, ordered=False)

    def in_order(self, task: Task[A, T], items: Iterable[A], at_once: int = 1) -> Generator[tuple[A, T], None, None]:
        """Each item with its result, in their order; more than can be at work are not begun."""
        del at_once
        yield from self._results(task, ((item, item) for item in items), silent, ordered=True)

    def _results(
        self, task: Task[A, T], items: Iterable[tuple[K, A]], report: Report, *, ordered: bool
    ) -> Generator[tuple[K, T], None, None]:
        for name in [name for name in sys.modules if name.startswith("fedmitr_flwr_")]:  # a user's file (`outside`)
            ray.cloudpickle.register_pickle_by_value(sys.modules[name])
        remote = self._remote.options(**self._needs())
        common = [ray.put(task)], torch.get_num_threads(), (core(), versions())  # in a list it is not fetched each time
        waiting = iter(items)
        running: dict[Any, K] = {}

        def fill() -> None:
            for key, item in islice(waiting, max(0, self._room(ordered) - len(running))):
                running[remote.remote(str(PACKAGE.parent), *common, item)] = key

        try:
            fill()
            while running:
                (done,), _ = ray.wait(list(running)[:1] if ordered else list(running))
                result, heard = _fetched(done)
                for units, values in heard:
                    report(units, **values)
                key = running.pop(done)
                fill()  # before the result is in use
                yield key, result
        finally:
            for unfinished in running:
                ray.cancel(unfinished, force=True)

    def _room(self, ordered: bool) -> int:
        """How many tasks Ray may know of. By `auto` it gets all, and places them on nodes that come late, too."""
        if self.count != AUTO:
            return int(self.count)
        if ordered or self.guest:
            return max(1, int(ray.cluster_resources().get("CPU", 1)) // torch.get_num_threads())
        return sys.maxsize

    def _needs(self) -> dict[str, Any]:
        """Of one task: CPUs as it has threads, and a share of a GPU where it runs on one."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most, gpus = (max(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
        needs: dict[str, Any] = {"max_retries": RETRIES, "scheduling_strategy": "SPREAD"}
        needs["num_cpus"] = 0 if self.guest else min(torch.get_num_threads(), most)  # more would be waited for
        if self.device.type == "cuda":
            every = ray.cluster_resources().get("GPU", 0.0)
            if not gpus or (self.guest and not ray.available_resources().get("GPU", 0.0)):
                raise RunError("workers: Ray has no GPU to give; set --client-gpus 0, workers = 0, or device = 'cpu'")
            needs["num_gpus"] = 1 if self.count == AUTO else min(1.0, every / int(self.count))
        return needs


def _fetched(done: Any) -> Any:
    """What a task gave back, or its own error as if it had been raised here."""
    try:
        return ray.get(done)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        text = f"a task of the server phase was lost, {RETRIES} times again ({type(error).__name__}); is memory short?"
        raise RunError(f"{text} lower workers, or inversion.batch-size") from error


_HELD: dict[str, Any] = {}  # in a worker: the last task, with the uploads, that it fetched


def _work(root: str, task: list[Any], count: int, made_by: tuple[Any, ...], item: Any) -> tuple[Any, list[Any]]:
    """In a worker: the result, and what the task reported of its progress."""
    if Path(root).is_dir() and root not in sys.path:
        sys.path.insert(0, root)  # Flower's copy of the app, on the same machine
    from fedmitr_flwr.common.compute import threads
    from fedmitr_flwr.common.errors import RunError
    from fedmitr_flwr.common.fingerprint import core
    from fedmitr_flwr.common.provenance import versions

    here = core(), versions()
    if here != made_by:
        raise RunError(f"a Ray worker has another environment ({here}) than the server ({made_by}); make them equal")
    key = task[0].hex()
    if key not in _HELD:
        _HELD.clear()
        _HELD[key] = ray.get(task[0])
    heard: list[Any] = []
    with threads(count):
        return _HELD[key](item, lambda units, **values: heard.append((units, values))), heard
