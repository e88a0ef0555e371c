"""Optimisation, and run directories that can be resumed."""
