"""The kinds of leaves of a decoder: plain weights, int8 and LoRA. Only they know how they are
stored.
"""
