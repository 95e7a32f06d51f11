"""The kinds of leaves of a decoder, and how each is stored: plain, int8, in groups, LoRA."""
