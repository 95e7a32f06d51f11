"""The memory that a process may use."""

import os

from qwen_jax.runtime import memory


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [tmp_path / name for name in ("first", "second")]
    monkeypatch.setattr(memory, "_LIMITS", limits)
    assert memory.usable() == whole
    limits[0].write_text("max\n")
    assert memory.usable() == whole
    limits[1].write_text("1000000\n")
    assert memory.usable() == 1_000_000
    limits[1].write_text(f"{2**63 - 4096}\n")  # version 1, without a limit
    assert memory.usable() == whole
