"""Rationales for labelled rows from a model behind an endpoint."""
