"""``python -m magi_attention``."""

from magi_attention.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
