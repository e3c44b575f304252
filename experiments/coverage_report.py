"""Figures and table of the coverage study."""
