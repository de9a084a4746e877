"""Wrong one-line variants of the code, each with the tests that must detect it: `python -m tests.mutants`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A wrong variant.

    Attributes:
      file: of the repository.
      old: text that stands in it once.
      new: what stands there instead.
      tests: arguments of pytest, the tests nearest to it.
    """

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()!r} → {self.new.strip()!r}"


def variants(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    """Wrong variants of one file.

    Args:
      file: of the package.
      tests: arguments of pytest.
      changes: (old text, new text) each.

    Returns:
      The mutants.
    """
    return [Mutant(f"jax_rlhf/{file}", old, new, tests) for old, new in changes]
