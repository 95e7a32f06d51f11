"""The pictures of docs/serving.md, taken anew into the folder that PICTURES names."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.page.test_page import CALL, ask
from tests.page.test_page_access import PHONE, REPLY

Open = Callable[..., Page]
LARGEST = 200_000  # bytes
SORTING = """**快速排序**先选一个基准：

1. 小于基准的放左边
2. 其余的放右边

```python
left = [x for x in a if x < p]
```
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(os.environ.get("PICTURES", tmp_path))


def test_pictures_are_small(model: Any, opened: Open, folder: Path) -> None:
    model.says(REPLY, pause=0.002)
    light = opened(model, viewport={"width": 1000, "height": 760}, color_scheme="light")
    ask(light, "How do I reverse a list?")
    light.mouse.move(0, 0)
    light.screenshot(path=folder / "page.png")
    model.says(lambda prompt: CALL if "get_weather: Call this tool" in prompt else "你好！")
    dark = opened(model, viewport={"width": 1000, "height": 620}, color_scheme="dark")
    dark.get_by_role("button", name="Settings").click()
    dark.get_by_role("button", name="Insert an example").click()
    dark.get_by_role("button", name="Done").click()
    model.says(lambda _: CALL.replace("weather", "get_weather"))
    ask(dark, "What is the weather in Rome?")
    dark.get_by_label("Result of get_weather").fill("sunny, 24 °C")
    dark.screenshot(path=folder / "page_tools.png")
    model.says(
        SORTING,
        pause=0.002,
    )
    phone = opened(model, **PHONE, locale="zh-CN")
    phone.fill("#input", "快速排序是怎样工作的？")
    phone.click("#send")
    expect(phone.get_by_role("button", name="重新生成")).to_be_visible()
    phone.screenshot(path=folder / "page_phone.png")
    sizes = [
        (folder / name).stat().st_size for name in ("page.png", "page_tools.png", "page_phone.png")
    ]
    assert max(sizes) < LARGEST
