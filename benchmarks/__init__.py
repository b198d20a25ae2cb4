"""Instruments: the compile gate and the timings. Run from a checkout: ``python -m benchmarks.gate``."""
