"""Rationales for labelled rows: `python -m opsd.rationalize rows.jsonl --out out.jsonl --endpoint URL --model NAME`."""

import sys

from opsd.rationales.command import main

if __name__ == "__main__":
    sys.exit(main())
