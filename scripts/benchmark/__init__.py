"""What is measured and how; bench.py and bench_peers.py run these modules, each in a process of its own."""
