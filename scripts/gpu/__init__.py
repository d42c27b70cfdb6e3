"""Checks of check_gpu.py, one file each."""
