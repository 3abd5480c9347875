"""What ranks take to solve and to grow together: `python -m bench.distributed`."""
