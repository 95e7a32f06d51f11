"""A quantised model in llama.cpp: `make test-llama`, in an environment of its own.

LLAMA_CPP is the folder of llama.cpp's source, which has the converter. Without it, or without the
packages of the `llama` extra, these tests are not collected.
"""

import importlib.util
import os

PACKAGES = ("dashscope", "llama_cpp", "torch")

there = "LLAMA_CPP" in os.environ and all(importlib.util.find_spec(name) for name in PACKAGES)
collect_ignore = [] if there else ["test_llama_cpp.py"]
