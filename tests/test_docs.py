"""Pages link to files that are there, and docs/api.md names what the source has.

`make docs` checks more, anchors among it, but in an environment that `make test` does not make.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    """To a file, not to a folder, which the site has no page for."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [link for link in links if not link.startswith("https://")]
    assert [link for link in local if not (page.parent / link).is_file()] == []


def test_the_api_page_names_what_is_there() -> None:
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    assert len(names) > 40
    assert [name for name in names if not is_defined(name)] == []


def is_defined(name: str) -> bool:
    """Whether a module has a function, class or annotated constant of that name."""
    module, _, member = name.rpartition(".")
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        return False
    body = ast.parse(file.read_text(encoding="utf-8")).body
    names = {getattr(node, "name", None) for node in body}
    names |= {ast.unparse(node.target) for node in body if isinstance(node, ast.AnnAssign)}
    return member in names


@pytest.mark.slow
def test_the_training_step_of_the_page_on_devices_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/devices.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    exec(block, {})
    loss, norm = capsys.readouterr().out.split()
    assert 8 < float(loss) < 9  # nearly log(4096): the weights are random
    assert float(norm) > 0
