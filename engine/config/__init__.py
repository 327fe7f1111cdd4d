"""Every option of a run, from the command line, a TOML file or an index."""
