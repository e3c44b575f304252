"""Averages, spreads and confidence sets: what `gns.estimate` and its kin are made of."""
