"""Parts of parity_rectools.py."""
