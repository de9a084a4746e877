"""The flags of `jax-rlhf run`."""

from absl import flags

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder for checkpoints, models, metrics and samples, or gs://bucket/folder."
)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete what the workdir has of the phases, and repeat them.")
COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    "~/.cache/jax_rlhf/compiled",
    "The folder for compiled programs, which the next start reuses; empty = compile at each start.",
)
CHECK = flags.DEFINE_bool(
    "check", False, "Only check settings, data and checkpoints, and show an example row per phase."
)
ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes",
    False,
    "Continue a run although its model, tokenizer, data or seed have changed since it was started.",
)

COORDINATOR = flags.DEFINE_string("coordinator", None, "The host:port of process 0, in runs with several processes.")
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "The number of processes; detected on TPU VMs, under Slurm and Open MPI, and in an indexed Kubernetes Job.",
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "The index of this process, from 0.")
PROCESS_TIMEOUT = flags.DEFINE_integer(
    "process_timeout", 100, "Seconds without a heartbeat after which a process counts as dead and the others exit."
)
