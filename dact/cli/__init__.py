"""The command line; `dact.cli.commands` is where to begin."""
