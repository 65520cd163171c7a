"""Measurements: likelihoods, generated answers, and one file per benchmark in evals/tasks/."""
