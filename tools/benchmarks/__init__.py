"""Benchmarks, one module for each subcommand of tools/bench.py."""
