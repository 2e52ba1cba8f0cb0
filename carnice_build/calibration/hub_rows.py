"""Rows of a dataset on the Hugging Face hub, as `datasets` streams them; runs in worker processes.

`datasets` decides what a subset and a split are, and only what it reads is fetched.
By itself it waits for a bad network without end, and takes a file that it could not ask for as one
that is not there.  So its requests go through a client that waits as ours do, and whose errors it
cannot take for its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from huggingface_hub import HfFileSystem, constants, set_client_factory
from huggingface_hub.utils import disable_progress_bars

from carnice_build.checkpoint.hub_cache import cached_dataset
from carnice_build.checkpoint.hub_listing import dataset_at, dataset_refusal
from carnice_build.checkpoint.patience import Refusal, judge, patiently
from carnice_build.errors import BackendError, CarniceError, CheckpointError
from carnice_build.extras import pip_install

_ABSENT = "EntryNotFound"
_SCRIPT = "scripts are no longer supported"


def rows_on_hub(name: str, subset: str | None, split: str, commit: str) -> Iterator[dict[str, Any]]:
    """The rows, in order, of a split of the dataset `name`, owner/name, at a commit.

    Raises CheckpointError when there is no such subset or split, when the repository needs a
    script of its own, which is never run, and when it cannot be read; BackendError without
    `datasets`.  Offline, the rows are those of the Hugging Face cache, which must hold all of it.
    """
    where = dataset_at(name, commit)
    if constants.is_offline_mode():
        place = {"path": str(cached_dataset(name, commit, where))}
    else:
        # A bare name could be that of a folder here.
        place = {"path": f"hf://datasets/{name}", "revision": commit}
        set_client_factory(lambda: _Client(where, dataset_refusal(name, commit)))
        # A listing that broke off is remembered as far as it came.
        HfFileSystem.clear_instance_cache()
    # From a cache of its own `datasets` would take the rows of any commit.
    with _worded(where), TemporaryDirectory(prefix="carnice-") as empty:
        yield from _load_dataset()(
            name=subset, split=split, streaming=True, cache_dir=empty, **place
        )


def _load_dataset() -> Any:
    """The library's function, which now reports to nobody."""
    try:
        import datasets
    except ImportError:
        raise BackendError(f"datasets is not installed: {pip_install('torch')}") from None
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    disable_progress_bars()
    return datasets.load_dataset


class _Client(httpx.Client):
    """The client of `huggingface_hub` and all that uses it: has each answer whole, or raises."""

    def __init__(self, where: str, refusal: Refusal) -> None:
        super().__init__(follow_redirects=True)
        self._where = where
        self._refusal = refusal

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """The answer to a request, which may be that a file is not there.

        Raises CheckpointError, never an error of httpx, which `datasets` would wait out.
        """
        # Some requests come without.
        timeout = httpx.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        request.extensions["timeout"] = timeout.as_dict()
        return patiently(lambda: self._answer(request, options), self._where, self._refusal)

    def _answer(self, request: httpx.Request, options: dict[str, Any]) -> httpx.Response:
        response = super().send(request, **options)
        response.read()
        if response.is_error and response.headers.get("X-Error-Code") != _ABSENT:
            raise judge(response, self._refusal)
        return response


@contextmanager
def _worded(where: str) -> Iterator[None]:
    try:
        yield
    except CarniceError:
        raise
    except Exception as error:  # the library raises whatever its readers raise
        if _SCRIPT in str(error):
            raise CheckpointError(
                "needs a script of its own, and such are never run",
                where=where,
                expected="a dataset of jsonl or parquet files, or one of them in a profile",
            ) from None
        words = " ".join(str(error).split())
        raise CheckpointError(
            f"cannot be read: {type(error).__name__}: {words}", where=where
        ) from None
