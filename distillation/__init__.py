"""The parts of distill.py: teacher, cache, student, divergences, layer losses, pruning, rollouts."""
