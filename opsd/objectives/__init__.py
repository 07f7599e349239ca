"""Objectives: pure functions from hidden states to a loss. One file each."""
