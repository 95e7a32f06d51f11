"""The plan before the bill: real programs compiled for devices that are not there, and costed."""
