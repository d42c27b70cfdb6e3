"""Parts of bench.py and bench_peers.py, most of which run in a process of their own."""
