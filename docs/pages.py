"""A hook of MkDocs that builds the site from the pages of the repository, where they are.

The site has the same tree as the repository, so that a relative link leads to the same page on a
forge and in the site. MkDocs itself takes pages from docs/ alone; those and the files below are
handed to it under their paths from the root. A link to any other file fails the build.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OTHERS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "docs/pictures/*.png",
    "docs/site.css",
    "examples/containers/*.Dockerfile",
    "examples/kubernetes/*.yaml",
    "examples/moby_dick/README.md",
    "examples/ray_serve.py",
    "examples/systemd/*.service",
    "notebooks/*.ipynb",
    "tests/golden/README.md",
)


def on_files(files: Files, config: Any) -> Files:
    """Put every page at its path from the repository's root. The theme's files stay as they are."""
    docs = Path(config.docs_dir)
    kept = [file for file in files if not Path(file.abs_src_path or "/").is_relative_to(docs)]
    paths = [*docs.rglob("*.md"), *(path for name in OTHERS for path in ROOT.glob(name))]
    names = sorted((path.relative_to(ROOT).as_posix(), path) for path in paths)
    pages = [File.generated(config, name, abs_src_path=str(path)) for name, path in names]
    return Files([*kept, *pages])
