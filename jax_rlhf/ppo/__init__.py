"""PPO: the four models, an iteration, the trainer, and the phase. Begin with step.py."""
