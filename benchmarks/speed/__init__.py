"""Parts of benchmarks/inversion_speed.py."""
