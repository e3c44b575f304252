"""One optimizer step of a real training: from hook events to sums on the host."""
