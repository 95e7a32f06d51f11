"""Files, processes, errors and the command line: what knows no model."""
