"""Sweeps, figures and the models they run on; imports gns, and nothing in gns imports it."""
