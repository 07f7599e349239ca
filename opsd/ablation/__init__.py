"""The paper's comparison on any rows: six arms, one budget, one table. `python -m opsd.ablate`."""
