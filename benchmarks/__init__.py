"""Measuring: what is timed and how (`harness`), a machine with a GPU (`gpu`), and what was found (``results/``)."""
