"""Recipes: a local copy of a public dataset, in the folders it is published in, becomes rows of `opsd.rows`."""
