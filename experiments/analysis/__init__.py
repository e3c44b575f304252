"""From rows to numbers with intervals. Pure functions: rows in, frozen records out, no file, no figure."""
