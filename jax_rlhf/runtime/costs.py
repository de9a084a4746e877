"""The costs of starts and checkpoints: seconds that a phase spent on anything but training, over all its starts.

They are in `<workdir>/<phase>/costs.json`, which is written as soon as a phase starts.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

COSTS = "costs.json"
_COMPILE = "/jax/core/compile/"


@functools.cache
def _compile_seconds() -> list[float]:
    """[seconds this process has spent on tracing and compiling]; a JAX listener, registered once, updates it."""
    seconds = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(_COMPILE):
            seconds[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


@dataclasses.dataclass
class Costs:
    """Totals over all starts of a phase. What a killed process spent after its last checkpoint is unknown.

    Attributes:
      starts: starts of the phase, including this one.
      compiling: seconds of tracing and compiling, or of loading compiled programs from the cache.
      restoring: seconds of reading checkpoints.
      repeated: seconds of steps that were repeated, since they came after the last checkpoint.
      saving: seconds that training waited for checkpoints.
    """

    starts: int = 1
    compiling: float = 0.0
    restoring: float = 0.0
    repeated: float = 0.0
    saving: float = 0.0

    def __post_init__(self) -> None:
        self._compiled = _compile_seconds()[0]

    def add(self, before: Mapping[str, float]) -> None:
        """Adds the `totals` of earlier starts."""
        for name, value in before.items():
            setattr(self, name, getattr(self, name) + value)

    @staticmethod
    def checked(content: Mapping[str, Any]) -> Mapping[str, float]:
        """Checks the content of costs.json, and returns it.

        Raises:
          ValueError: it does not have the form that `totals` returns.
        """
        names = {field.name for field in dataclasses.fields(Costs)}
        numbers = all(type(value) in (int, float) and 0 <= value < 1e12 for value in content.values())
        if content.keys() != names or not numbers or type(content["starts"]) is not int:
            raise ValueError(f"{COSTS} has other content than this program writes.")
        return content

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the duration of the block to a total.

        Args:
          name: "restoring" or "saving".
        """
        started = time.monotonic()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.monotonic() - started)

    def totals(self) -> dict[str, float]:
        """Name → count or seconds, for checkpoints and costs.json."""
        now = _compile_seconds()[0]
        self.compiling, self._compiled = self.compiling + now - self._compiled, now
        totals = dataclasses.asdict(self)
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in totals.items()}

    def summary(self) -> dict[str, float]:
        """The totals for summary.json: "starts", and "seconds_<name>" for the others."""
        return {name if name == "starts" else f"seconds_{name}": value for name, value in self.totals().items()}
