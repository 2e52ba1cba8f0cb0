"""Calibration datasets on a hub: their rows are those of `datasets`, at one commit, or an error."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from calibrating import DEMO, FINE_TUNE, QUICK
from conftest import Finished, Project
from fake_hub import TOKEN, Answer, FakeHub, cut, stall, status
from huggingface_hub import HfFileSystem, constants, set_client_factory
from huggingface_hub.utils import _detect_agent, _http

from carnice_build.calibration.hub_rows import rows_on_hub
from carnice_build.calibration.tokenizing import tokenize
from carnice_build.checkpoint import patience
from carnice_build.checkpoint.hub_listing import dataset_commit
from carnice_build.checkpoint.patience import ATTEMPTS, Unreachable
from carnice_build.errors import CheckpointError

pytest_plugins = ["calibrating", "hub_fixtures"]

Carnice = Callable[..., Finished]
NAMES = {"jsonl": "owner/lines", "parquet": "owner/tables"}
COMMIT = "e" * 40
BOTH = pytest.mark.parametrize("form", NAMES)
CARD = """---
configs:
- config_name: easy
  data_files:
  - split: train
    path: easy/*.{form}
  - split: held
    path: held.{form}
- config_name: hard
  data_files: hard.{form}
---
"""


def chat(number: int) -> dict[str, Any]:
    """Row `number`."""
    turns = [("user", f"What are {number} green bottles?"), ("assistant", "Too many.")]
    return {"id": number, "messages": [{"role": role, "content": text} for role, text in turns]}


def write(path: Path, numbers: range) -> None:
    """A file of these rows, in parquet or jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [chat(number) for number in numbers]
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(found)
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in found))


def write_dataset(root: Path, form: str) -> None:
    """Subset `easy` with splits `train`, of more files than a page of the hub's list, and `held`,
    and subset `hard`."""
    for part in range(5):
        write(root / "easy" / f"part-{part}.{form}", range(part * 4, part * 4 + 4))
    write(root / f"held.{form}", range(100, 103))
    write(root / f"hard.{form}", range(200, 207))
    (root / "README.md").write_text(CARD.format(form=form))


@pytest.fixture
def served(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, Path]]:
    """Folders of datasets by form, on a hub that `datasets` takes for real, in workers too."""
    import datasets

    for name, value in {
        "HF_ENDPOINT": hub.hub_url,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.hub_url)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    verbosity = datasets.logging.get_verbosity()
    folders = {form: tmp_path / form for form in NAMES}
    for form, folder in folders.items():
        write_dataset(folder, form)
        hub.add(f"datasets/{NAMES[form]}", folder, COMMIT)
    yield folders
    datasets.logging.set_verbosity(verbosity)
    HfFileSystem.clear_instance_cache()
    set_client_factory(_http.default_client_factory)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited between attempts, without waiting."""
    found: list[float] = []
    clock = SimpleNamespace(sleep=found.append, time=time.time)
    monkeypatch.setattr(patience, "time", clock)
    return found


def rows(form: str, subset: str | None = "easy", split: str = "train") -> list[dict[str, Any]]:
    """All rows."""
    return list(rows_on_hub(NAMES[form], subset, split, COMMIT))


def numbers(*arguments: Any) -> list[int]:
    """The numbers of all rows."""
    return [row["id"] for row in rows(*arguments)]


Served = dict[str, Path]

# --- rows ----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("subset", "split", "expected"),
    [
        ("easy", "train", range(20)),
        ("easy", "held", range(100, 103)),
        ("hard", "train", range(200, 207)),
    ],
)
def test_rows_of_a_subset_and_split(
    served: Served, form: str, subset: str, split: str, expected: range
) -> None:
    """All rows of the files that the card names come out whole, in order."""
    assert [chat(number) for number in expected] == rows(form, subset, split)


@BOTH
def test_files_without_a_card(served: Served, form: str) -> None:
    """In a repository without a card the splits are told by the names of the files."""
    shutil.rmtree(served[form])
    write(served[form] / "data" / f"train.{form}", range(3))
    write(served[form] / "data" / f"test.{form}", range(3, 5))

    assert [0, 1, 2] == numbers(form, None)
    assert [3, 4] == numbers(form, None, "test")


@BOTH
def test_files_behind_the_wanted_rows_are_not_read(served: Served, hub: FakeHub, form: str) -> None:
    """Of five files of a split only the first is read for its first row."""
    stream = rows_on_hub(NAMES[form], "easy", "train", COMMIT)
    first = next(stream)
    stream.close()
    asked = {item.file for item in hub.requests if item.range and item.host == "hub"}

    assert chat(0) == first
    assert {f"/datasets/{NAMES[form]}/resolve/{COMMIT}/easy/part-0.{form}"} == asked


DIFFERENT: list[dict[str, Any]] = [
    {
        "messages": [
            {
                "role": "assistant",
                "content": "Hm.",
                "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
            }
        ],
        "tools": [{"name": "f", "parameters": {key: {"type": "string"} for key in arguments}}],
    }
    for arguments in ({"city": "Oslo"}, {"days": "two", "city": "Rome"}, {"days": "one"})
]


@BOTH
def test_rows_bring_no_keys_of_other_rows(served: Served, tmp_path: Path, form: str) -> None:
    """Tools and calls of one row leave no nulls in the prompt of another."""
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in DIFFERENT))
    path = served[form] / f"hard.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(DIFFERENT), path)
    else:
        shutil.copyfile(lines, path)
    dataset = {"name": NAMES[form], "subset": "hard", "split": "train", "commit": COMMIT}

    assert tokens(rows="jsonl", file=lines) == tokens(dataset=dataset)


def tokens(file: Path | None = None, **params: Any) -> list[list[int]]:
    """The tokens of three rows, under a template that shows all there is."""
    template = "{{ messages | tojson(sort_keys=true) }}{{ tools | tojson(sort_keys=true) }}"
    fixed = {"samples": 3, "length": 1000, "roles": {}, "special_tokens": {}}
    content = (DEMO / "qwen3.6-27b" / "tokenizer.json").read_bytes()
    return tokenize(
        {**fixed, "template": template, **params},
        np.frombuffer(content, np.uint8),
        str(file) if file else None,
    )


def test_a_folder_of_that_name_is_not_taken(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder `owner/lines` in the working folder is not the dataset."""
    write(tmp_path / NAMES["jsonl"] / "train.jsonl", range(7, 9))
    monkeypatch.chdir(tmp_path)

    assert list(range(20)) == numbers("jsonl")


def test_no_cache_of_another_commit_is_taken(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that `datasets` has stored before are not given for a commit that is not there."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.load_dataset(NAMES["jsonl"], "easy", split="train")
    with pytest.raises(CheckpointError, match="the repository has no revision"):
        list(rows_on_hub(NAMES["jsonl"], "easy", "train", "f" * 40))


def test_the_token_goes_to_the_hub_alone(served: Served, hub: FakeHub) -> None:
    """The CDN, which has the parquet files, never sees the token."""
    numbers("parquet")

    assert {f"Bearer {TOKEN}"} == {asked.token for asked in hub.requests if asked.host == "hub"}
    assert {None} == {asked.token for asked in hub.requests if asked.host == "cdn"}


@BOTH
def test_nobody_else_is_asked(
    served: Served, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """All requests are about the dataset: none counts it or is for telemetry."""
    hosts = set()
    send = httpx.Client.send

    def watched(self: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        hosts.add(request.url.host)
        return send(self, request, **options)

    monkeypatch.setattr(httpx.Client, "send", watched)
    monkeypatch.setattr(_detect_agent, "_registry", None)
    dataset_commit(NAMES[form], "main")
    rows(form)

    assert {"127.0.0.1"} == hosts
    assert [] == [asked.file for asked in hub.requests if NAMES[form] not in asked.file]


# --- the commit ----------------------------------------------------------------------------------


def test_a_branch_is_one_request(served: Served, hub: FakeHub) -> None:
    """The commit of a branch is asked for once, and then known without a network."""
    assert COMMIT == dataset_commit(NAMES["jsonl"], "main")
    assert 1 == len(hub.requests)
    constants.HF_HUB_OFFLINE = True
    assert COMMIT == dataset_commit(NAMES["jsonl"], "main")
    assert 1 == len(hub.requests)


def test_a_commit_is_no_request(served: Served, hub: FakeHub) -> None:
    """A recipe that names a commit asks the hub nothing."""
    assert "a" * 40 == dataset_commit(NAMES["jsonl"], "a" * 40)
    assert [] == hub.requests


def test_an_unreachable_hub_leaves_the_branch_where_it_was(
    served: Served, hub: FakeHub, waits: list[float]
) -> None:
    """What a branch was when last asked is good enough for a hub that does not answer."""
    hub.fail("revision/main", status(503), times=2 * ATTEMPTS, host="hub")
    with pytest.raises(
        Unreachable, match=f"datasets/{NAMES['jsonl']}@main: the server answered 503"
    ):
        dataset_commit(NAMES["jsonl"], "main")
    hub.faults.clear()
    dataset_commit(NAMES["jsonl"], "main")
    hub.fail("revision/main", status(503), times=2 * ATTEMPTS, host="hub")

    assert COMMIT == dataset_commit(NAMES["jsonl"], "main")


# --- faults --------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("matches", "change"),
    [
        ("README", status(503)),
        ("/revision/", status(500)),
        ("/tree/", status(429, Retry_After="7")),
        ("/tree/", cut(5)),
        (r"part-1\.", status(504)),
        (r"part-1\.", cut(100)),
    ],
    ids=["card", "info", "limit", "listing", "file", "cut"],
)
def test_what_passes_is_waited_out(
    served: Served,
    hub: FakeHub,
    waits: list[float],
    form: str,
    matches: str,
    change: Callable[[Answer], Any],
) -> None:
    """Failures in a row, wherever they are, leave the rows as they are."""
    host = "cdn" if form == "parquet" and "part" in matches else "hub"
    hub.fail(matches, change, times=2, host=host)

    assert list(range(20)) == numbers(form)
    assert 2 == len(waits)


def test_a_listing_that_stands_still(served: Served, hub: FakeHub, waits: list[float]) -> None:
    """A request that the library would wait for without end is given up and made again."""
    hub.fail("/tree/", stall(60), host="hub")
    start = time.monotonic()

    assert list(range(20)) == numbers("jsonl")
    assert 1 == len(waits)
    assert time.monotonic() - start < 30


@BOTH
@pytest.mark.parametrize("matches", ["README", "/revision/", "/tree/", r"part-0\.", r"part-1\."])
def test_a_hub_that_is_down_is_one_error(
    served: Served, hub: FakeHub, waits: list[float], form: str, matches: str
) -> None:
    """After as many attempts as a checkpoint gets, the error names the dataset."""
    hub.fail(matches, status(502), times=1000, host="hub")
    with pytest.raises(Unreachable) as caught:
        rows(form)

    assert f"datasets/{NAMES[form]}@{COMMIT}" == caught.value.where
    assert f"the server answered 502; gave up after {ATTEMPTS} attempts" == caught.value.what
    assert ATTEMPTS - 1 == len(waits)


@BOTH
def test_half_a_listing_is_forgotten(
    served: Served, hub: FakeHub, waits: list[float], form: str
) -> None:
    """After a failure between two pages of a listing, the next attempt has all files."""
    hub.fail("/tree/", lambda answer: None, host="hub")
    hub.fail("/tree/", status(502), times=ATTEMPTS, host="hub")
    with pytest.raises(Unreachable):
        rows(form)

    assert list(range(20)) == numbers(form)


@pytest.mark.parametrize("token", ["", "hf_another"])
def test_a_gated_dataset(
    served: Served, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    """Without a token that may read it, the error says where to ask for access."""
    monkeypatch.setenv("HF_TOKEN", token)
    hub.gated[f"datasets/{NAMES['jsonl']}"] = TOKEN
    page = f"{hub.hub_url}/datasets/{NAMES['jsonl']}"
    for ask in (lambda: rows("jsonl"), lambda: dataset_commit(NAMES["jsonl"], "main")):
        with pytest.raises(CheckpointError, match=rf"is gated; expected a token .* at {page}$"):
            ask()


def test_a_missing_dataset(served: Served) -> None:
    """A name that the hub does not have, or a commit, is said to be that."""
    missing = r"datasets/no/such@.*no such repository, or a private one"
    with pytest.raises(CheckpointError, match=missing):
        dataset_commit("no/such", "main")
    with pytest.raises(CheckpointError, match=missing):
        list(rows_on_hub("no/such", None, "train", COMMIT))
    with pytest.raises(CheckpointError, match="the repository has no revision 'aaaa"):
        list(rows_on_hub(NAMES["jsonl"], "easy", "train", "a" * 40))


@BOTH
@pytest.mark.parametrize(
    ("subset", "split", "names"),
    [
        ("eazy", "train", ("easy", "hard")),
        (None, "train", ("easy", "hard")),
        ("easy", "test", ("train", "held")),
    ],
)
def test_what_the_dataset_does_not_have(
    served: Served, form: str, subset: str | None, split: str, names: tuple[str, ...]
) -> None:
    """The error for a subset or a split names those that there are."""
    with pytest.raises(CheckpointError) as caught:
        rows(form, subset, split)

    assert [True] * len(names) == [name in str(caught.value) for name in names]


def test_a_script_is_never_run(served: Served) -> None:
    """A repository with a script is refused, and the script is left alone."""
    (served["jsonl"] / "lines.py").write_text("raise SystemExit('was run')")
    with pytest.raises(CheckpointError, match="needs a script of its own, and such are never run"):
        rows("jsonl")


@BOTH
def test_a_file_that_is_none(served: Served, form: str) -> None:
    """A file that cannot be read is an error of one line."""
    (served[form] / "easy" / f"part-0.{form}").write_bytes(b"{'nonsense\n" * 100)
    with pytest.raises(CheckpointError, match="cannot be read: ") as caught:
        rows(form)

    assert "\n" not in str(caught.value)


def test_without_a_network(served: Served) -> None:
    """HF_HUB_OFFLINE is heeded."""
    constants.HF_HUB_OFFLINE = True
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE .* forbids to fetch it"):
        rows("jsonl")


# --- the command line ----------------------------------------------------------------------------


SETTINGS = (*QUICK, f"calibration.dataset={NAMES['parquet']}", "calibration.subset=hard")


@pytest.fixture
def online(small: Project, served: Served) -> Project:
    """A project that has its models here, and its dataset on the hub."""
    path = small.recipes / "_profiles.yaml"
    entry = f"demo:\n  {NAMES['parquet']}: hub\n"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(entry if line.startswith("demo:") else line for line in lines))
    return small


def settings(*more: str) -> list[str]:
    """Arguments that calibrate on the dataset."""
    return [part for item in (*SETTINGS, *more) for part in ("--set", item)]


def to_run(carnice: Carnice, *more: str) -> int:
    """How many actions a build would run."""
    finished = carnice("plan", FINE_TUNE, *settings(*more), "--json")
    assert 0 == finished.code, finished.err
    return int(json.loads(finished.out)["actions"]["run"])


def test_a_build_over_the_hub(
    online: Project, hub: FakeHub, carnice: Carnice, ran: Callable[..., Counter[str]]
) -> None:
    """Rows from the hub are tokens as the same rows in a file are, and belong to their commit."""
    name = f"datasets/{NAMES['parquet']}"
    finished = carnice("build", FINE_TUNE, *settings())
    assert 0 == finished.code, finished.err
    record = json.loads(online.built(FINE_TUNE)["build.json"])
    assert {"name": NAMES["parquet"], "commit": COMMIT} == record["dataset"]
    unchanged = to_run(carnice)
    hub.add(name, hub.repos[name].folder, "f" * 40)
    moved = to_run(carnice)
    hub.forget()
    pinned = to_run(carnice, f"calibration.revision={COMMIT}")

    assert [] == hub.requests
    assert (0, 1, 0) == (unchanged, moved, pinned)
    # Once its tokens are found to be the same, nothing behind them is done again.
    write(online.root / "bottles.jsonl", range(200, 207))
    made = ran(online, FINE_TUNE, changes=["calibration.dataset=bottles.jsonl"])
    assert {"calibration.tokens": 1} == made


@pytest.mark.parametrize(
    ("matches", "fault", "words"),
    [
        ("resolve/.*/README", status(403, X_Error_Code="GatedRepo"), "the repository is gated"),
        ("/revision/main", status(401, X_Error_Code="RepoNotFound"), "no such repository"),
    ],
    ids=["build", "plan"],
)
def test_a_build_that_cannot_have_it(
    online: Project,
    hub: FakeHub,
    carnice: Carnice,
    matches: str,
    fault: Callable[[Answer], None],
    words: str,
) -> None:
    """The command ends with code 2 and one line, which names the dataset; the project is left."""
    before = {path.name for path in online.root.iterdir()}
    hub.fail(matches, fault, times=1000, host="hub")
    finished = carnice("build", FINE_TUNE, *settings())
    last = finished.err.splitlines()[-1]

    assert 2 == finished.code
    assert f"datasets/{NAMES['parquet']}@" in last
    assert words in last
    assert "Traceback" not in finished.err
    assert {"cache"} >= {path.name for path in online.root.iterdir()} - before
