"""The quantiser: makes weights of 4 or 8 bits from a float model and calibration texts (GPTQ)."""
