"""What the site is told while it is built: the version, and where the repository is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parent.parent
_WITH_HOST = re.compile(
    r"(?:https?://|ssh://)?(?:[^@/]+@)?(?P<host>[\w-]+(?:\.[\w-]+)+)[:/](?P<name>.+)"
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the version to the title of the site, and the repository, where it has an address."""
    source = (ROOT / "flax_partial" / "__init__.py").read_text()
    config.site_name += " " + re.findall(r'^__version__ = "(.+)"', source, re.MULTILINE)[0]
    git = ["git", "-C", str(ROOT), "config", "remote.origin.url"]
    origin = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    config.repo_url = config.repo_url or repository(origin)
    if config.repo_url:
        config.repo_name = config.repo_url.split("/", 3)[-1]
    return config


def repository(origin: str) -> str:
    """Returns the address by which a browser finds a remote of git's; "" if it has none."""
    found = _WITH_HOST.fullmatch(origin.removesuffix(".git"))
    return f"https://{found['host']}/{found['name']}" if found else ""
