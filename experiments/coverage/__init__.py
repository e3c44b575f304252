"""How often the confidence sets hold the true noise scale, by simulation."""
