"""The parts that model.py is built from: positions, caches, ternary weights, devices."""
