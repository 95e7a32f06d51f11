"""The kinds of leaves of a decoder, and how each is stored: plain weights, int8 and LoRA."""
