"""Eight simulated devices for every test; set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub

import jax

jax.config.update("jax_num_cpu_devices", 8)
