"""Kinds of leaves of a decoder: plain weights, eight bits, adapters. Only they know storage."""
