"""Replicas behind Ray Serve: `make test-ray`, in an environment of its own, the extra `ray`.

Without that package, these tests are not collected.
"""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("ray") else ["test_ray_serve.py"]
