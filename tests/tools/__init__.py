"""Tools for the tests and the benchmarks, each of which is also a script; none needs torch."""
