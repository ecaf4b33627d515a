"""Precis beside other ways to run the same model on the same machine."""
