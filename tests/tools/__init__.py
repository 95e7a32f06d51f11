"""Tools for the tests and the benchmarks; each is a script too, and none needs torch."""
