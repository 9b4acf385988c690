"""The one seam for work that falls into independent pieces: local processes today, a cluster's workers later."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_work(function: Callable[[Item], Result], items: Sequence[Item], workers: int = 1) -> Iterator[Result]:
    """Yield `function(item)` for every item, in the order of `items`, computed by up to `workers` processes.

    `function` is a module-level function; items and results travel between processes, so they are plain and small.
    """
    if workers == 1 or len(items) < 2:
        yield from map(function, items)
        return
    # spawn: a fork would copy the threads' locks of Prefect and MLflow in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
        yield from pool.map(function, items, chunksize=max(1, len(items) // (workers * 16)))
