"""Files, processes, errors and the command line. Nothing in this room knows a model."""
