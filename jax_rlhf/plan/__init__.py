"""`python -m jax_rlhf.plan`: compiles every program of a run for hardware that is not there, and says what it takes."""
