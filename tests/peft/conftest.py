"""Our files in PEFT and transformers: `make test-peft`, in an environment of its own.

Without the packages of the `peft` extra, these tests are not collected.
"""

import importlib.util
import os

PACKAGES = ("peft", "torch")

there = all(importlib.util.find_spec(package) for package in PACKAGES)
collect_ignore = [] if there else ["test_peft.py", "test_qwen2_in_transformers.py"]
if there:  # PEFT may ask the hub about a base model by its name
    os.environ["HF_HUB_OFFLINE"] = "1"
