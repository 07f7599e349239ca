"""A local copy of a dataset as rows: `python -m opsd.recipes NAME --root DIR --out rows.jsonl [--dry-run]`."""

import sys

from opsd.affect.recipes.command import main

if __name__ == "__main__":
    sys.exit(main())
