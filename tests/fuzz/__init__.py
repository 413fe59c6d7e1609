"""Inputs without sense at every border: ``python -m tests.fuzz`` sends 100,000 to each."""
