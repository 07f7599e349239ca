"""The paper's comparison with one command: `python -m opsd.ablate [config.yaml] [section.key=value ...]`."""

import sys

from opsd.ablation.command import main

if __name__ == "__main__":
    sys.exit(main())
