"""Benchmarks. `make bench` (`python -m bench`) times, checks and prints; with `--record` it adds to `bench/ledger.jsonl`."""
