"""The command line, a file a command."""

import argparse
import sys
from collections.abc import Sequence

from magi_attention.cli import doctor, plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"magi-attention: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    parser = argparse.ArgumentParser(prog="magi-attention", description="Context-parallel attention for any mask.")
    commands = parser.add_subparsers(required=True, metavar="command")
    plan.add_parser(commands)
    doctor.add_parser(commands)
    return parser
