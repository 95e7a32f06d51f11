"""Our GPTQ folders in AutoGPTQ and GPTQModel: `make test-gptq`, in an environment of its own.

Without the packages of that environment, these tests are not collected.
"""

import importlib.util
import os

PACKAGES = ("auto_gptq", "gptqmodel", "torch")

there = all(importlib.util.find_spec(package) for package in PACKAGES)
collect_ignore = [] if there else ["test_gptq_tools.py"]
if there:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # GPTQModel would compile each layer, in C++
