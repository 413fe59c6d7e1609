"""Sphinx's configuration for ``make site``: the pages of the repository as they are.

MyST reads the same CommonMark as a code host shows, so a page needs no second form. A link that
leads nowhere, a page that is missing below and a block in an unknown language stop the build.
"""

import tomllib
from itertools import chain
from pathlib import Path
from shutil import copyfile

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]

# What a reader needs, in the order in which it is needed.
NAVIGATION = {
    "First hour": ["docs/tutorial", "docs/backend", "docs/faq", "docs/glossary", "docs/comparison"],
    "Use": [
        "docs/python",
        "docs/javascript",
        "docs/mailbox",
        "docs/groups",
        "docs/push-fallback",
        "docs/ingress",
        "examples/page/README",
        "examples/react/README",
        "examples/node-worker/README",
        "examples/own-table/README",
        "examples/document/README",
        "examples/replicache/README",
        "examples/fcm/README",
        "examples/three-instances/README",
        "clients/js/README",
    ],
    "Operate": [
        "docs/deploy",
        "docs/configuration",
        "docs/operating",
        "docs/console",
        "docs/monitoring",
        "docs/logging",
        "docs/tracing",
        "docs/security",
        "docs/backup",
        "docs/upgrade",
        "docs/cores",
        "docs/partitioned",
        "docs/coordination",
        "docs/transports/nats",
        "docs/transports/redis",
        "docs/transports/google-pubsub",
    ],
    "Understand": [
        "docs/why",
        "ARCHITECTURE",
        "docs/redline",
        "docs/storm",
        "docs/simulation",
        "docs/benchmarks",
        "docs/roadmap",
        "CONTRIBUTING",
        "tests/vectors/client/README",
    ],
    "Reference": ["docs/protocol", "docs/settings", "docs/api", "CHANGELOG", "docs/README"],
}

project = "pokebridge"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = [f"{page}.md" for page in chain(*NAVIGATION.values())]
include_patterns += [
    "*.md",
    "docs/**.md",
    "examples/*/README.md",
]  # a page without a place is found
exclude_patterns = [".*", "**/node_modules", "dist", "src", "var"]
nitpicky = True
myst_heading_anchors = 6
myst_enable_extensions = ["html_image"]

html_theme = "furo"
html_title = f"pokebridge {release}"
html_favicon = "../../src/pokebridge/console/static/shared/icon.svg"
html_copy_source = False
html_show_copyright = False


def add_navigation(_: Sphinx, page: str, source: list[str]) -> None:
    """Put the navigation at the end of the first page, where only the site shows it."""
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            options = f":hidden:\n:caption: {caption}\n"
            entries = "\n".join(f"/{each}" for each in pages)
            source[0] += f"\n```{{toctree}}\n{options}\n{entries}\n```\n"


def copy_first_page(app: Sphinx, error: Exception | None) -> None:
    """Make the first page what a server answers for the folder."""
    if error is None:
        copyfile(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    """What Sphinx calls before it builds."""
    for language in ("calc", "jsx"):  # Pygments does not know them
        app.add_lexer(language, TextLexer)
    app.connect("source-read", add_navigation)
    app.connect("build-finished", copy_first_page)
