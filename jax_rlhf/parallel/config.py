"""The settings of the mesh."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each axis; −1, once, means the rest."""

    data: int = 1
    """Copies of everything, each with its own rows. Of several TPU slices each has its own copies."""
    fsdp: int = -1
    """Rows, and parameters cut along their width."""
    tensor: int = 1
    """Heads, MLP width and vocabulary."""
    rules: tuple[str, ...] = ()
    """Lines of the table in `parallel/layout.py` that differ, "logical=mesh+mesh" each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutMeshConfig:
    """The same devices in another form, for sampling; all None = chosen by the model (`parallel.rollout_layout`)."""

    data: int | None = None
    """As in `MeshConfig`; None = 1 where another is given."""
    fsdp: int | None = None
    """As in `MeshConfig`; None = 1 where another is given."""
    tensor: int | None = None
    """As in `MeshConfig`; None = 1 where another is given."""
