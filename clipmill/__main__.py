"""Run the command line: `python -m clipmill`."""

from clipmill.cli.app import main

if __name__ == "__main__":
    main()
