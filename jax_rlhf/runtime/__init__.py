"""What every phase runs in: folder, checkpoints, logs, preemption, watchdog."""
