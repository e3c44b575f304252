"""Figures of sweeps, drawn from their rows alone: `python -m experiments.figures --preset NAME`."""
