"""The runtime that all phases share: workdir, checkpoints, logs, preemption, watchdog."""
