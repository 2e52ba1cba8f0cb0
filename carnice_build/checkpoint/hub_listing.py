"""Which files a repository of the hub holds at which commit, and what was learnt of them before."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from blake3 import blake3
from huggingface_hub import HfApi, cached_assets_path, constants

from carnice_build.checkpoint.checkpoint import TEMPLATE_FOLDER, is_plain_name, is_plain_path
from carnice_build.checkpoint.http_file import LIBRARY
from carnice_build.checkpoint.hub_cache import HASH, cached_commit, cached_files
from carnice_build.checkpoint.patience import (
    ATTEMPTS,
    MALFORMED,
    Refusal,
    Unreachable,
    interruptions,
    patiently,
    refused,
)
from carnice_build.errors import CheckpointError
from carnice_build.version import __version__

ALLOWED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    f"{TEMPLATE_FOLDER}/*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
    "README.md",
)
"""The only files of a repository that are ever asked for."""

_FILES = "files-3"
"""The kind of note that a listing is kept as; another one whenever more files are allowed."""

_MAX_FILES = 100_000

_log = logging.getLogger(__name__)

# The library would tell the hub what else is installed and who runs it, and first ask for a list of
# whom that may be.
constants.HF_HUB_DISABLE_TELEMETRY = True


@dataclass(frozen=True)
class Listing:
    """The allowed files of a commit with size and content id, and the names of the others.

    `whole` is False when nobody knows whether there are more.
    """

    commit: str
    files: dict[str, tuple[int, str]]
    others: tuple[str, ...]
    whole: bool = True


def find_listing(model: str, revision: str, notes: Notes, file: str | None = None) -> Listing:
    """What `revision` of a model holds: from the hub or, without a network, as last known.

    `file` is one that is allowed beside those that all may be asked for.
    Known is what we noted and what any tool left in the Hugging Face cache.
    A commit that we noted is never asked for again.
    """
    commit = revision
    if not HASH.fullmatch(revision):
        commit = _last_commit(model, "model", revision, notes)
    noted = _load_listing(commit, notes, file)
    if noted is not None and commit == revision:
        return noted
    known = noted or _cached_listing(model, commit, file)
    if known is not None and constants.is_offline_mode():
        return known
    try:
        listing = _fetch_listing(model, revision, ATTEMPTS if noted is None else 1, file)
    except Unreachable:
        if known is None:
            raise
        _log.warning("cannot reach the hub: %s stays at %s", model, known.commit[:7])
        return known
    notes.write("revision", revision, listing.commit.encode())
    rows = [(name, size, content) for name, (size, content) in listing.files.items()]
    rows += [(name, 0, "") for name in listing.others]
    notes.write(_FILES, _noted_as(listing.commit, file), json.dumps(rows).encode())
    return listing


def dataset_commit(dataset: str, revision: str) -> str:
    """The commit of a dataset's `revision`: from the hub or, without a network, as last known.

    A full commit hash is taken at its word, without a request.
    """
    if HASH.fullmatch(revision):
        return revision
    notes = Notes(_dataset(dataset))
    known = _last_commit(dataset, "dataset", revision, notes)
    if known and constants.is_offline_mode():
        return known
    try:
        commit = _ask_commit(dataset, revision, 1 if known else ATTEMPTS)
    except Unreachable:
        if not known:
            raise
        _log.warning("cannot reach the hub: %s stays at %s", dataset, known[:7])
        return known
    notes.write("revision", revision, commit.encode())
    return commit


def _ask_commit(dataset: str, revision: str, attempts: int) -> str:
    where = dataset_at(dataset, revision)
    api = HfApi(constants.ENDPOINT, library_name=LIBRARY, library_version=__version__)
    ask = partial(
        api.dataset_info, dataset, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    commit = patiently(ask, where, dataset_refusal(dataset, revision), attempts).sha
    if not isinstance(commit, str) or not HASH.fullmatch(commit):
        raise CheckpointError("the hub names no commit", where=where)
    return commit


def dataset_at(dataset: str, revision: str) -> str:
    """How an error calls a dataset."""
    return f"{_dataset(dataset)}@{revision}"


def dataset_refusal(dataset: str, revision: str) -> Refusal:
    """Words an answer of 4xx about a dataset."""
    return partial(
        refused,
        where=dataset_at(dataset, revision),
        endpoint=constants.ENDPOINT,
        model=_dataset(dataset),
        revision=revision,
    )


def _dataset(name: str) -> str:
    """The name of a dataset's repository among those of models, and the path of its page."""
    return f"datasets/{name}"


def _last_commit(repo: str, kind: str, branch: str, notes: Notes) -> str:
    """The commit that a branch was at when the hub was last asked, by us or by another tool."""
    noted = notes.read("revision", branch).decode()
    cached, when = cached_commit(repo, kind, branch)
    return cached if cached and when > notes.time("revision", branch) else noted


def _noted_as(commit: str, file: str | None) -> str:
    """What a listing is noted as; with another file allowed it is another one."""
    return commit if file is None else f"{commit}/{file}"


def _cached_listing(model: str, commit: str, file: str | None) -> Listing | None:
    rows, whole = cached_files(model, commit)
    if not rows:
        return None
    if not whole:
        _log.warning(
            "%s@%s is taken as the Hugging Face cache has it, which may be a part",
            model,
            commit[:7],
        )
    return replace(_check_listing(commit, rows, file), whole=whole)


def _load_listing(commit: str, notes: Notes, file: str | None) -> Listing | None:
    try:
        rows = json.loads(notes.read(_FILES, _noted_as(commit, file)))
        return _check_listing(commit, rows, file)
    except MALFORMED:
        return None


def _fetch_listing(model: str, revision: str, attempts: int, file: str | None) -> Listing:
    where = f"{model}@{revision}"
    api = HfApi(constants.ENDPOINT, library_name=LIBRARY, library_version=__version__)
    ask = partial(
        api.model_info,
        model,
        revision=revision,
        files_metadata=True,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )

    def refusal(response: httpx.Response) -> CheckpointError:
        return refused(response, where, constants.ENDPOINT, model, revision)

    info = patiently(ask, where, refusal, attempts)
    with interruptions(where, refusal):
        rows = [
            (item.rfilename, item.size, item.lfs.sha256 if item.lfs else item.blob_id)
            for item in info.siblings or ()
        ]
        listing = _check_listing(info.sha, rows, file)
    if HASH.fullmatch(revision) and listing.commit != revision:
        raise CheckpointError(f"the hub answers for commit {listing.commit}", where=where)
    return listing


def _check_listing(commit: Any, rows: Sequence[Any], file: str | None) -> Listing:
    """Take nothing on trust that becomes part of a path or a number."""
    if not HASH.fullmatch(commit) or len(rows) > _MAX_FILES:
        raise ValueError
    files: dict[str, tuple[int, str]] = {}
    others = []
    for name, size, content in rows:
        if not is_plain_path(name):
            continue
        if name != file and not _is_allowed(name):
            others += [name] if is_plain_name(name) else []
            continue
        if not HASH.fullmatch(content) or type(size) is not int or size < 0:
            raise ValueError
        files[name] = (size, content)
    return Listing(commit, files, tuple(others))


def _is_allowed(name: str) -> bool:
    """True when a pattern fits that is for the same folder; a glob's `*` takes `/` as well."""
    return any(
        fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in ALLOWED
    )


class Notes:
    """Small facts about a repository that spare requests, in the assets of the Hugging Face cache.

    Each is kept with its digest; one that is damaged is as good as none.
    """

    def __init__(self, model: str) -> None:
        """CheckpointError when there is no place to keep them; offline there is nothing to keep."""
        try:
            self._folder = cached_assets_path(
                LIBRARY, namespace=model, subfolder="hub", assets_dir=constants.HF_ASSETS_CACHE
            )
        except (OSError, ValueError):
            if not constants.is_offline_mode():
                raise CheckpointError(
                    "cannot be used as the Hugging Face cache",
                    where=constants.HF_ASSETS_CACHE,
                    expected="a folder one can write to, or another in HF_HOME",
                ) from None
            self._folder = Path(constants.HF_ASSETS_CACHE, "none")

    def _path(self, kind: str, name: str) -> Path:
        return self._folder / f"{kind}-{blake3(name.encode()).hexdigest()}"

    def read(self, kind: str, name: str) -> bytes:
        """The fact, b"" when it is not known."""
        try:
            digest, _, content = self._path(kind, name).read_bytes().partition(b"\n")
        except OSError:
            return b""
        return content if digest == _digest(content) else b""

    def time(self, kind: str, name: str) -> float:
        """When the fact was noted, in seconds as files have it; 0 when it was not."""
        try:
            return self._path(kind, name).stat().st_mtime
        except OSError:
            return 0.0

    def write(self, kind: str, name: str, content: bytes) -> None:
        """Keep the fact, if the disk lets us."""
        with suppress(OSError), tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
            try:
                file.write(_digest(content) + b"\n" + content)
                file.flush()
                Path(file.name).replace(self._path(kind, name))
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def _digest(content: bytes) -> bytes:
    return blake3(content).hexdigest().encode()
