"""What stands behind a measurement at frozen weights: how it runs, what it says, how it is kept."""
