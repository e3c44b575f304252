"""One file a command of the command line; `gns.cli` registers them."""
