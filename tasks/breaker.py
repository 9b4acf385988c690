"""Leave a service that failed alone for a while, so that one that is down costs one timeout and not one per call."""

import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Say = Callable[[str], None]

PAUSE, LONGEST_PAUSE = 30.0, 300.0
"""Seconds for which a service that failed is left alone: after the first failure, doubled with every further one, at most."""


class Breaker:
    """Calls that may fail. `say` hears once that the service failed, and once that it can be used again."""

    def __init__(self, service: str, say: Say) -> None:
        self._service = service
        self._say = say
        self._lock = threading.RLock()
        self._alone_until = 0.0
        self._pause = PAUSE
        self._down = False

    def attempt(self, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result | None:
        """What `call` returns; None if it raised, or another call did a moment ago."""
        try:
            with self._lock:
                if time.monotonic() < self._alone_until:  # asked here: whoever waited for a call that failed need not try too
                    return None
                result = call(*args, **kwargs)
        except Exception as error:  # a client raises what its stores, its server and the network raise: no list is complete
            self._alone_until = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            if not self._down:
                self._down = True
                self._say(f"{self._service} cannot be used ({root_cause(error)}); the run goes on and ships the rest later")
            return None
        if self._down:
            self._down, self._pause = False, PAUSE
            self._say(f"{self._service} can be used again")
        return result

    def retry_now(self) -> None:
        """Let the next call through."""
        self._alone_until = 0.0


def root_cause(error: BaseException) -> str:
    """Why something failed, in one line: what the error at the bottom says."""
    while (deeper := error.__cause__ or error.__context__) is not None:
        error = deeper
    return (str(error).strip() or type(error).__name__).partition("\n")[0][:300]
