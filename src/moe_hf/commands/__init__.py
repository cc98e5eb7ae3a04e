"""What can be done from a command line: one module for each subcommand of `moe-hf`, and for the script of its name."""
