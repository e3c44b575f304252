"""What the monitor costs: full training steps with and without it, interleaved, beside its peers."""
