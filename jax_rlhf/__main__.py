"""`python -m jax_rlhf`: the command `jax-rlhf`."""

from jax_rlhf.cli.main import run

if __name__ == "__main__":
    run()
