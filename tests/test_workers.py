"""Ray's workers give the bits that threads give, also where one of them dies; what fails there fails here."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tiny import CPU, same, settings, two_uploads
from torch import Tensor

from fedmitr_flwr import judge, methods
from fedmitr_flwr.common.errors import ConfigError, RunError
from fedmitr_flwr.common.workers import Report, Threads, Workers, hired, silent
from fedmitr_flwr.config.unread import unread_line
from fedmitr_flwr.data.images import Images
from fedmitr_flwr.methods.contract import Fused, Job
from fedmitr_flwr.screening.answers import strange_answers


@pytest.fixture(scope="module")
def apart() -> Iterator[Callable[..., None]]:
    """Call it where a Ray is: Ray ends a process at once whose raylet dies, and that should not be pytest's."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=start_ray) as process:
        yield lambda check, *given: process.submit(check, *given).result()


def start_ray() -> None:
    """With it, all workers are guests of a Ray that is there already: so it is under Flower's simulation."""
    import ray

    torch.set_num_threads(1)
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no folder of tests


def test_settings_of_workers() -> None:
    for wrong in ("-1", "two", "01", "1.5", ""):
        with pytest.raises(ConfigError, match=r"workers = .* is not possible; use 0, a number of workers, or auto"):
            settings(workers=wrong)
    assert settings(workers=2).workers == "2"
    alone = settings(**{"ray-address": "auto"})
    assert 'ray-address = "auto" (workers = "0")' in unread_line(alone, {}, ["ray-address"])
    assert "ray-address" not in unread_line(settings(workers="auto", **{"ray-address": "auto"}), {})
    with hired("0", "", CPU) as workers:
        assert isinstance(workers, Threads)


def noted(folder: Path, number: int, report: Report) -> tuple[int, Tensor]:
    """A file for each time that it is done; the worker of number 2 is killed the first time."""
    (folder / f"{number}-{os.getpid()}").touch()
    if number == 2 and len(list(folder.glob("2-*"))) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if number > 5:
        raise RunError(f"number {number} diverged")
    report(10, loss=number)
    return torch.get_num_threads(), torch.full((3,), float(number))


@pytest.mark.slow
def test_a_killed_worker_s_task_is_done_again_and_no_other(apart: Callable[..., None], tmp_path: Path) -> None:
    apart(one_is_killed, tmp_path)


def one_is_killed(folder: Path) -> None:
    heard: list[float] = []
    items = {f"item {number}": number for number in range(5)}
    with hired("2", "", CPU) as two:
        with closing(two.as_made(partial(noted, folder), items, 1, lambda n, loss: heard.append(n * loss))) as results:
            made = dict(results)
        assert {key: (count, tensor.tolist()) for key, (count, tensor) in made.items()} == {
            key: (torch.get_num_threads(), [float(number)] * 3) for key, number in items.items()
        }
        assert sorted(heard) == [0, 10, 20, 30, 40]
        assert sorted(path.name[0] for path in folder.iterdir()) == ["0", "1", "2", "2", "3", "4"]
        in_order = two.in_order(partial(noted, folder), iter(range(5)))
        assert [(number, int(tensor[0])) for number, (_, tensor) in in_order] == [(n, n) for n in range(5)]
        with pytest.raises(RunError, match=r"^number 6 diverged$"):
            dict(two.as_made(partial(noted, folder), {6: 6}, 1, silent))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedmitr", "coboosting"])
def test_the_same_bits_as_by_threads(apart: Callable[..., None], method: str) -> None:
    apart(same_bits, method)


def same_bits(method: str) -> None:
    """Of images, student, evaluation and screening, with two batches in each of two rounds."""
    few = {"inversion.batch-size": 5, "distill.rounds": 2, "distill.epochs-per-round": 3, "ensemble.weights": "size"}
    config = settings(method=method, **few)
    uploads = two_uploads(config)

    def fused(workers: Workers) -> Fused:
        return methods.fuse(Job(uploads, config, CPU, lambda **_: None, workers=workers))

    with hired("2", "", CPU) as two:
        one, other = fused(Threads()), fused(two)
        assert one.weights
        assert other.weights
        assert one.pool
        assert other.pool
        assert same(one.weights, other.weights)
        assert same(one.pool.tensors(), other.pool.tensors())
        drawn = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        images = Images(drawn, torch.arange(30) % 3)
        alone, away = ([*judge.answers_of(uploads, images, config, CPU, workers)] for workers in (None, two))
        assert all(map(torch.equal, alone, away))
        five = [*uploads, *two_uploads(config), uploads[0]]
        assert strange_answers(five, config, CPU, 1) == strange_answers(five, config, CPU, 1, two)
