"""Faults are put where code is: each text that becomes a fault is there, once."""

from tests.tools import mutations


def test_every_fault_has_its_place():
    texts = {
        fault: (mutations.ROOT / fault.module).read_text("utf-8") for fault in mutations.FAULTS
    }
    assert [fault.module for fault, text in texts.items() if text.count(fault.text) != 1] == []
