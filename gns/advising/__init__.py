"""What stands behind `gns.advice`: laws, ranges, plans and the sentences about them."""
