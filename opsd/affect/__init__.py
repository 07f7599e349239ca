"""Affect: the embedded job on drawn faces and synthetic voices."""
