"""What any tool left of a repository in the Hugging Face cache, for when the hub cannot be asked.

`huggingface_hub` has a folder for each repository there: in `refs/` a file for each branch, which
holds the commit that the branch was at; in `snapshots/` a folder for each commit, with such files
as somebody wanted; and in `trees/`, where somebody wanted all of them, the list of all.
"""

from __future__ import annotations

import re
from pathlib import Path

from blake3 import blake3
from huggingface_hub import RepoFile, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from carnice_build.checkpoint.patience import OFFLINE
from carnice_build.checkpoint.source import LocalFile
from carnice_build.errors import CheckpointError

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""A commit, or the hub's id of a content."""

Row = tuple[str, int, str]
"""A file of a repository: its path there, its size, and the id of its content."""


def cached_commit(repo: str, kind: str, branch: str) -> tuple[str, float]:
    """The commit that the cache holds for a branch, and when that was noted; "" without one.

    `kind` is `model` or `dataset`; the time is in seconds, as files have it.
    """
    folder = _snapshot(repo, kind, branch)
    if folder is None:
        return "", 0.0
    try:
        return folder.name, (folder.parents[1] / "refs" / branch).stat().st_mtime
    except OSError:  # somebody has just removed it
        return "", 0.0


def cached_files(model: str, commit: str) -> tuple[list[Row], bool]:
    """The files of a model at a commit, and whether they are all that there are.

    With the list of all, the files that the cache does not hold are among them; without it, they
    are what the cache holds, if anything.
    """
    folder = _snapshot(model, "model", commit)
    if folder is None:
        return [], False
    tree = _tree(model, "model", commit)
    listed = {file.path: file for file in tree or ()}
    rows = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            file = listed.pop(name, None)
            rows.append((name, file.size if file else path.stat().st_size, _content_id(path)))
    rows += [(file.path, file.size, file.blob_id) for file in listed.values()]
    return rows, tree is not None


def cached_dataset(dataset: str, commit: str, where: str) -> Path:
    """The folder that holds all files of a dataset at a commit.

    CheckpointError naming `where` when the cache does not, or cannot tell: the rows of a part
    could pass for those of the whole.
    """
    folder, tree = _snapshot(dataset, "dataset", commit), _tree(dataset, "dataset", commit)
    expected = f"all of it there, as `hf download --repo-type dataset {dataset}` puts it"
    if folder is None or tree is None:
        what = "is not as a whole in the Hugging Face cache"
    elif missing := [file.path for file in tree if not (folder / file.path).is_file()]:
        what = f"{missing[0]} is not in the Hugging Face cache"
    else:
        return folder
    raise CheckpointError(
        f"{what}, and {OFFLINE} forbids to fetch it", where=where, expected=expected
    )


def _snapshot(repo: str, kind: str, revision: str) -> Path | None:
    """The folder of a branch's or a commit's files, whichever there are; None without one."""
    try:
        path = snapshot_download(
            repo,
            repo_type=kind,
            revision=revision,
            cache_dir=constants.HF_HUB_CACHE,
            local_files_only=True,
            allow_patterns=[],  # none of them need be there
        )
    except (OSError, ValueError):
        return None
    folder = Path(path)
    return folder if HASH.fullmatch(folder.name) else None


def _tree(repo: str, kind: str, commit: str) -> list[RepoFile] | None:
    """The list of all files of a commit, None when the cache has none."""
    try:
        return get_cached_repo_tree(
            repo, repo_type=kind, revision=commit, cache_dir=constants.HF_HUB_CACHE
        )
    except (CachedRepoTreeNotFoundError, OSError, ValueError):
        return None


def _content_id(path: Path) -> str:
    """The hub's id, by which the cache names what its snapshots link to.

    A file in the place of a link has none: it gets one of its own, which changes when it does.
    """
    name = path.resolve().name
    linked = path.is_symlink() and HASH.fullmatch(name)
    return name if linked else blake3(LocalFile(path).identity.encode()).hexdigest()
