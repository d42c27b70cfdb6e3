"""The parts of parity_rectools.py."""
