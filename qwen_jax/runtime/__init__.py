"""Files, processes, errors and the command line. Nothing in this package knows a model."""
