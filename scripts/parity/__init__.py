"""Parts of parity_peers.py."""
