"""The kinds of leaves of a decoder, and how each is stored: plain weights, int8, integers in groups, and LoRA."""
