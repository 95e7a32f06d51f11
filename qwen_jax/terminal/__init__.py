"""The chat command: questions from a terminal or a pipe, answered by a model as it writes."""
