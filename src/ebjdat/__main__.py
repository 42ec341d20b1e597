"""`python -m ebjdat`: the same as the command `ebjdat`."""

import sys


def main() -> None:
    try:
        from ebjdat.cli import app
    except KeyboardInterrupt:  # while it is read, which takes a second: nothing has begun
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
