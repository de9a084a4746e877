"""What a phase's starts and checkpoints cost: seconds that were no training, over all its starts.

They stand in `<workdir>/<phase>/costs.json`, from the beginning of each start on.
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
def _compiling() -> list[float]:
    """Seconds that this process has traced and compiled, in one place: JAX tells it to a listener, and keeps that."""
    seconds = [0.0]

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(_COMPILE):
            seconds[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


@dataclasses.dataclass
class Costs:
    """Counts on where former starts left off; seconds after the last checkpoint of a killed process are not known.

    Attributes:
      starts: of the phase, this one among them.
      compiling: seconds of tracing and compiling, or of finding programs that were compiled before.
      restoring: seconds of reading checkpoints.
      repeated: seconds of steps that were done again, since they were after the last checkpoint.
      saving: seconds that training waited for checkpoints.
    """

    starts: int = 1
    compiling: float = 0.0
    restoring: float = 0.0
    repeated: float = 0.0
    saving: float = 0.0

    def __post_init__(self) -> None:
        self._compiled = _compiling()[0]

    def go_on(self, before: Mapping[str, float]) -> None:
        """Adds what former starts cost.

        Args:
          before: from `so_far`.
        """
        for name, value in before.items():
            setattr(self, name, getattr(self, name) + value)

    @staticmethod
    def checked(content: Mapping[str, Any]) -> Mapping[str, float]:
        """What a file says that former starts cost.

        Args:
          content: of the file.

        Returns:
          The same.

        Raises:
          ValueError: it is not what `so_far` returns.
        """
        names = {field.name for field in dataclasses.fields(Costs)}
        numbers = all(type(value) in (int, float) and 0 <= value < 1e12 for value in content.values())
        if content.keys() != names or not numbers or type(content["starts"]) is not int:
            raise ValueError(f"{COSTS} is not what this program writes.")
        return content

    @contextlib.contextmanager
    def taking(self, name: str) -> Iterator[None]:
        """Counts the seconds that the block takes.

        Args:
          name: "restoring" or "saving".

        Yields:
          Nothing.
        """
        started = time.monotonic()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.monotonic() - started)

    def so_far(self) -> dict[str, float]:
        """For a checkpoint.

        Returns:
          Name → count or seconds.
        """
        now = _compiling()[0]
        self.compiling, self._compiled = self.compiling + now - self._compiled, now
        found = dataclasses.asdict(self)
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}

    def summary(self) -> dict[str, float]:
        """For summary.json.

        Returns:
          "starts", and "seconds_<name>" of the others.
        """
        return {name if name == "starts" else f"seconds_{name}": value for name, value in self.so_far().items()}
