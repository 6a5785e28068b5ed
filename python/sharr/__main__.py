"""``python3 -m sharr`` is the command ``sharr``."""

import sys


def main():
    try:
        from . import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        print(f"sharr: {package} is missing: apt install python3-{package}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
