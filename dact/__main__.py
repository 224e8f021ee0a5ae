"""``python -m dact`` and the console script ``dact``."""


def main() -> None:
    """Run the command line."""
    from dact.cli import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
