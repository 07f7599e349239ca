"""The page of a run: what is computed for it, and how it is drawn. `python -m opsd.report RUN_DIR` writes it."""
