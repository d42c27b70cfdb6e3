"""Recommendation from a finished run: top-k lists for users, and the items most similar to an item."""
