"""The settings of the mesh."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each mesh axis; one of them may be −1, all the remaining devices."""

    data: int = 1
    """Replicas of the model, each with its own rows. Each of several TPU slices has replicas of its own."""
    fsdp: int = -1
    """Shards of the rows, and of parameters along the model width."""
    tensor: int = 1
    """Shards of heads, MLP width and vocabulary."""
    rules: tuple[str, ...] = ()
    """Overrides of the table in `parallel/layout.py`, each "logical=mesh+mesh"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutMeshConfig:
    """The same devices as a mesh for sampling; all None = chosen from the model's sizes (`parallel.rollout_layout`)."""

    data: int | None = None
    """As in `MeshConfig`; None = 1 if another size is set."""
    fsdp: int | None = None
    """As in `MeshConfig`; None = 1 if another size is set."""
    tensor: int | None = None
    """As in `MeshConfig`; None = 1 if another size is set."""
