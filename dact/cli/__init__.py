"""The command line; start reading at `dact.cli.commands`."""
