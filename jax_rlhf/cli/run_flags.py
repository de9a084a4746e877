"""The flags of `jax-rlhf run`."""

from absl import flags

WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder for checkpoints, models, metrics and samples; or gs://bucket/folder."
)
OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Repeat phases that the workdir already has. Their files are deleted."
)
COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    "~/.cache/jax_rlhf/compiled",
    "The folder of compiled programs, which the next start reuses; empty: none.",
)
CHECK = flags.DEFINE_bool(
    "check", False, "Check settings, data and checkpoints, show a row of data per phase, and stop."
)
ACCEPT_CHANGES = flags.DEFINE_bool(
    "accept_changes",
    False,
    "Continue although model, tokenizer, data or seed differ from those that the workdir was started with.",
)

COORDINATOR = flags.DEFINE_string("coordinator", None, "With several processes: host:port of process 0.")
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "The number of processes; detected on TPU VMs, Slurm and GKE."
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "The index of this process, from 0.")
PROCESS_TIMEOUT = flags.DEFINE_integer(
    "process_timeout", 100, "Seconds without a heartbeat after which a process counts as dead, and the others exit."
)
