"""`python -m jax_rlhf.plan`: compiles a run for hardware that need not be present, to estimate its memory and time."""
