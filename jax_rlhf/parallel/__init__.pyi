from .layout import (
    LOGICAL_TO_MESH as LOGICAL_TO_MESH,
    Layout as Layout,
    as_layout as as_layout,
    constrained as constrained,
    lookup_layout as lookup_layout,
    machine_of as machine_of,
    reshard_steps as reshard_steps,
    rollout_layout as rollout_layout,
    tensor_has_fast_links as tensor_has_fast_links,
)
from .mesh import (
    MeshConfig as MeshConfig,
    RolloutMeshConfig as RolloutMeshConfig,
    create_layout as create_layout,
    create_mesh as create_mesh,
)
from .partition import (
    constrain_to as constrain_to,
    gather_to_host as gather_to_host,
    padded_vocab_size as padded_vocab_size,
    shardings as shardings,
    shardings_of as shardings_of,
    take_replicated as take_replicated,
)
from .processes import (
    ProcessError as ProcessError,
    any_process as any_process,
    barrier as barrier,
    check_same_on_all_processes as check_same_on_all_processes,
    exit_process as exit_process,
    start_processes as start_processes,
    sum_over_processes as sum_over_processes,
)
from .rows import (
    all_rows as all_rows,
    batch_rows as batch_rows,
    gather_rows as gather_rows,
    join_row_groups as join_row_groups,
    local_row_indices as local_row_indices,
    local_rows as local_rows,
    map_row_groups as map_row_groups,
    owned_rows as owned_rows,
    put_rows as put_rows,
    row_shards as row_shards,
    split_row_groups as split_row_groups,
)
