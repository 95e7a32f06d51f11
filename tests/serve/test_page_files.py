"""The files of the page, without a browser: what they load, their words, their libraries."""

import hashlib
import re
from pathlib import Path

from qwen_jax.serve.app import PAGE
from tests.support.served_app import opened

FILES = sorted(file for file in PAGE.rglob("*") if file.is_file())
OWN = [file for file in FILES if file.parent == PAGE]
VENDOR = PAGE / "vendor"
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which nothing loads


def text(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def test_nothing_comes_from_elsewhere() -> None:
    """And what is loaded is there."""
    for file in OWN:
        content = file.read_text(encoding="utf-8").replace(NAMESPACE, "")
        assert not re.search(r"https?://|[\"'(]//|@import|\burl\(", content), file.name
        loaded = re.findall(r"(?:from|import|import\() ?\"(\./[^\"]+)\"", content)
        loaded += re.findall(r"<(?:link|script)[^>]*(?:href|src)=\"([^\"]+)\"", content)
        assert all((PAGE / name).is_file() for name in loaded), loaded
        if file.name == "index.html":
            assert set(loaded) >= {"app.js", "style.css", "text.css", "icon.svg"}
    for file in VENDOR.glob("*.js"):
        assert not re.search(r"^import\b|\bimport\(|\bfetch\(|XMLHttp", file.read_text(), re.M)


def test_the_policy_against_inline_code_is_kept() -> None:
    html = text("index.html")
    assert re.findall(r"<script\b(?![^>]*\bsrc=)", html) == []
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    for file in PAGE.glob("*.js"):
        content = file.read_text(encoding="utf-8")
        assert not re.search(r"\beval\(|new Function|setAttribute\(\"style", content), file.name


def test_files_are_served_with_their_types() -> None:
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    with opened() as one:
        for file in FILES:
            answer = one.client.get(f"/{file.relative_to(PAGE).as_posix()}")
            assert answer.status_code == 200 and answer.content == file.read_bytes()
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["content-type"].startswith(types.get(file.suffix, ""))


def test_libraries_are_as_published_with_their_licences() -> None:
    sums = dict(reversed(line.split()) for line in text("vendor/SHA256SUMS").splitlines())
    listed = {file.name for file in VENDOR.iterdir()} - {"SHA256SUMS", "README.md", "refresh.sh"}
    assert set(sums) == listed
    for name, wanted in sums.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == wanted, name
    libraries = [file.stem for file in VENDOR.glob("*.js")]
    assert sorted(libraries) == ["highlight", "markdown-it", "purify"]
    for name in libraries:
        licence = text(f"vendor/{name}.LICENSE")
        assert re.search("copyright", licence, re.IGNORECASE) and len(licence) > 1000
    readme, script = text("vendor/README.md"), text("vendor/refresh.sh")
    for package, version in re.findall(r"^take (\S+) (\S+)", script, re.MULTILINE):
        assert f"{package} {version}" in readme


def test_the_page_is_small() -> None:
    assert sum(file.stat().st_size for file in FILES) < 500_000
    assert all(len(file.read_text(encoding="utf-8").splitlines()) <= 350 for file in OWN)


def words(language: str) -> dict[str, str]:
    """The page's words in one language."""
    (block,) = re.findall(rf"const {language} = {{\n(.*?)\n}};", text("words.js"), re.DOTALL)
    found = re.findall(r"^  (\w+): \"(.*)\",$", block, re.MULTILINE)
    assert len(found) == len(block.splitlines())
    return dict(found)


def test_both_languages_have_the_words_that_are_used() -> None:
    english, chinese = words("ENGLISH"), words("CHINESE")
    assert list(english) == list(chinese)
    for name in english:
        places = [sorted(re.findall(r"\{\d\}", one[name])) for one in (english, chinese)]
        assert places[0] == places[1], name
    assert [name for name in chinese if chinese[name].isascii()] == ["top_p", "top_k"]
    own = "".join(file.read_text(encoding="utf-8") for file in OWN if file != PAGE / "words.js")
    used = set(re.findall(r"data-t(?:-label|-hint)?=\"([^\"$]+)\"", own))
    assert used | set(re.findall(r"\bt\(\"(\w+)\"", own)) <= set(english)
    assert [name for name in english if not re.search(rf"\b{name}\b", own)] == []


def test_elements_that_scripts_name_are_there() -> None:
    html = text("index.html")
    ids = set(re.findall(r"\bid=\"([^\"]+)\"", html))
    assert len(ids) == len(re.findall(r"\bid=\"", html))
    for file in PAGE.glob("*.js"):
        named = set(re.findall(r"(?:\$|getElementById)\(\"([^\"]+)\"\)", Path(file).read_text()))
        assert named <= ids, file.name
        icons = re.findall(r"icon: \"(\w+)\"|#i-(\w+)", Path(file).read_text())
        assert {f"i-{''.join(one)}" for one in icons} <= ids, file.name
    others = re.findall(r"(?:for|aria-(?:controls|labelledby|describedby))=\"([^\"]+)\"", html)
    assert set(" ".join(others).split()) <= ids
