"""What distill.py uses: teachers, their caches, students, divergences, layer losses, pruning."""
