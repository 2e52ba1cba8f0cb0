"""What a calibration promises: no pass twice, the same bytes always, the library's tokens."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibrating import BASE, DEMO, FINE_TUNE, QUICK, build
from conftest import Finished, Project
from tiny import Tensor, contents, read_all_tensors, read_safetensors, write_safetensors

from carnice_build.commands.build import build_variants

pytest_plugins = ["calibrating"]

Ran = Callable[..., Counter[str]]
FORWARD, QUANTIZE = "calibration.forward", "nvfp4.quantize"


def blob_sizes(project: Project) -> list[int]:
    files = (path for path in (project.cache / "blobs").rglob("*") if path.is_file())
    return sorted(path.stat().st_size for path in files)


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def start(project: Project, *variants: str, **environment: str) -> subprocess.Popen[str]:
    settings = [part for item in QUICK for part in ("--set", item)]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "carnice_build",
            "build",
            *variants,
            *settings,
            "--jobs",
            "1",
            "--json",
        ],
        cwd=project.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
        # Tests that run in the background are told to ignore it, and so would the build.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


# --- reuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        ("quantize.defaults=modelopt-0.43", "quantize.keep=mtp.*"),
        ('quantize.keep="*.layers.1.mlp.*"',),
    ],
)
def test_a_knob_of_the_weights_runs_no_forward_pass(
    calibrated: Project, ran: Ran, change: tuple[str, ...]
) -> None:
    """Which weights are quantized is no part of a calibration: its statistics are in the cache."""
    made = ran(calibrated, FINE_TUNE, changes=change)

    assert {QUANTIZE, "nvfp4.input_scales"} >= set(made)


def test_another_text_quantizes_no_weight(calibrated: Project, ran: Ran) -> None:
    """Another dataset, more samples, longer ones: the passes run again, the weights stay."""
    text = "\n".join(f"{number} green bottles hanging on the wall" for number in range(9))
    (calibrated.root / "bottles.txt").write_text(text)
    changes = ("dataset=bottles.txt", "samples=3", "length=25")
    build(calibrated, FINE_TUNE)
    before = inodes(calibrated.out / FINE_TUNE)
    made = ran(calibrated, FINE_TUNE, changes=[f"calibration.{change}" for change in changes])
    after = inodes(calibrated.out / FINE_TUNE)

    assert {"calibration.tokens", "calibration.embed", FORWARD, "nvfp4.input_scales"} == set(made)
    assert 4 == made[FORWARD]
    # Of five shards, the one of all small tensors holds the input scales.
    assert 1 == len([name for name in before if before[name] != after[name]])


def test_scales_of_a_cache_that_are_asked_for_later_take_no_pass(
    calibrated: Project, ran: Ran
) -> None:
    """Of the layer with full attention; the passes kept what nobody had asked for then."""
    assert Counter({"kv_cache.scales": 1}) == ran(
        calibrated, FINE_TUNE, changes=["quantize.kv_cache.format=fp8"]
    )


@pytest.mark.parametrize("command", ["plan", "build"])
def test_too_few_rows_are_told_before_any_work(
    command: str, calibrated: Project, carnice: Callable[..., Finished]
) -> None:
    """A recipe that wants more samples than its file has is stopped at the plan."""
    (calibrated.root / "few.jsonl").write_text('{"text": "Some words."}\n' * 3)
    few = ["--set", "calibration.dataset=few.jsonl", "--set", "calibration.samples=4"]
    finished = carnice(command, FINE_TUNE, *few)

    assert 2 == finished.code
    assert "few.jsonl: gives 3 samples; expected 4, or fewer `samples`" in finished.err
    assert "action" not in finished.err


def test_the_base_shares_what_the_fine_tune_left_equal(calibrated: Project, ran: Ran) -> None:
    """Only the groups of layers that differ are quantized, and equal shards are one file."""
    build_variants(["mlx-4bit"], calibrated.options())
    mlx = contents(calibrated.out / "mlx-4bit")
    build(calibrated, FINE_TUNE)
    made = ran(calibrated, BASE)
    ours, theirs = (inodes(calibrated.out / name) for name in (FINE_TUNE, BASE))
    base, tuned = (read_all_tensors(calibrated.out / name) for name in (BASE, FINE_TUNE))
    packed = [name for name in base if base[name] != tuned[name] and base[name].dtype == "U8"]
    layers = {name.split(".layers.")[1].split(".")[0] for name in packed}

    # Of four groups each in two of the four layers.
    assert 8 == made[QUANTIZE]
    assert {"2", "3"} == layers
    assert 3 == len(set(ours.values()) & set(theirs.values()))
    assert not [op for op in made if op.startswith("mlx")]
    assert mlx == contents(calibrated.out / "mlx-4bit")


def _own_checkpoint(project: Project) -> Path:
    """The fine-tune as files of the test's own, which it may change."""
    source = project.checkpoint.resolve()
    (project.root / "demo").unlink()
    shutil.copytree(source.parent, project.root / "demo")
    return project.checkpoint / "model.safetensors"


def test_other_files_of_the_same_content_calibrate_nothing_again(
    calibrated: Project, ran: Ran
) -> None:
    """They are read once more; that hidden states are gone matters to nobody."""
    _own_checkpoint(calibrated)

    assert Counter() == ran(calibrated, FINE_TUNE)


def test_a_changed_layer_redoes_the_layers_from_it_on(calibrated: Project, ran: Ran) -> None:
    """The hidden states before it are made again for that layer alone, its statistics are not."""
    path = _own_checkpoint(calibrated)
    tensors = read_safetensors(path)
    (name,) = (name for name in tensors if name.endswith("layers.2.mlp.gate_proj.weight"))
    weight = tensors[name]
    zeros = Tensor(weight.dtype, weight.shape, bytes(len(weight.data)))
    write_safetensors(path, {**tensors, name: zeros})
    made = ran(calibrated, FINE_TUNE)

    assert {QUANTIZE: 1, FORWARD: 2} == {op: made[op] for op in (QUANTIZE, FORWARD)}


def test_the_mtp_head_is_the_bases_byte_for_byte(calibrated: Project) -> None:
    """The 15 tensors of the graft are published as they are in their source."""
    build(calibrated, FINE_TUNE)
    built, base = (read_all_tensors(path) for path in (calibrated.out / FINE_TUNE, calibrated.base))
    head = {name: tensor for name, tensor in built.items() if name.startswith("mtp.")}

    assert 15 == len(head)
    assert head == {name: base[name] for name in head}


def test_hidden_states_do_not_outlive_the_build(shared: Project) -> None:
    """What is left of a calibration are its tokens, and some numbers of each layer."""
    sizes = Counter(blob_sizes(shared))

    # Tokens 2 x 24 x I32; eight linears in each linear layer, seven in the full one,
    # of whose keys and values there are four ends for each of two samples.
    # Then squares of what linears of a layer are given, of 128, 256 and 512 columns, and counts.
    assert Counter({192: 1, 32: 3 + 1, 28: 1, 512: 8, 1024: 4, 2048: 4, 4: 1}) == sizes
    assert [] == list((shared.cache / "partial").iterdir())


def test_gc_keeps_a_calibrated_build_a_no_op(
    calibrated: Project, ran: Ran, carnice: Callable[..., Finished]
) -> None:
    """After `cache gc` nothing is calibrated again for a build folder that is there."""
    build(calibrated, FINE_TUNE)
    collected = carnice("cache", "gc", "--json")
    made = ran(calibrated, FINE_TUNE)

    assert collected.code == 0
    assert Counter() == made


# --- the same bytes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(shared: Project) -> dict[str, bytes]:
    """The folder of an undisturbed build with one worker."""
    return contents(shared.out / FINE_TUNE)


def test_any_number_of_jobs_gives_the_same_folder(
    calibrated: Project, reference: dict[str, bytes]
) -> None:
    """Four workers make the bytes of one."""
    shutil.rmtree(calibrated.cache)
    build(calibrated, FINE_TUNE, jobs=4)

    assert reference == contents(calibrated.out / FINE_TUNE)


def test_a_file_system_without_links_gives_the_same_folder(
    calibrated: Project, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers then get copies of what they read, for themselves."""

    def refuse(link: Path, target: Path) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    shutil.rmtree(calibrated.cache)
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    build(calibrated, FINE_TUNE)

    assert reference == contents(calibrated.out / FINE_TUNE)


def test_base_and_fine_tune_together_run_equal_layers_once(
    calibrated: Project, reference: dict[str, bytes], ran: Ran
) -> None:
    """One build of both makes the bytes of two, and passes equal hidden states on once."""
    shutil.rmtree(calibrated.cache)
    made = ran(calibrated, FINE_TUNE, BASE, jobs=3)

    assert reference == contents(calibrated.out / FINE_TUNE)
    assert 4 + 2 == made[FORWARD]
    assert (1, 1) == (made["calibration.tokens"], made["calibration.embed"])
    assert {192, 32, 28, 512, 1024, 2048, 4} == set(blob_sizes(calibrated))


def test_builds_at_once_share_a_cache(calibrated: Project, reference: dict[str, bytes]) -> None:
    """Three processes on one empty cache all end well, and two of one variant run it once."""
    shutil.rmtree(calibrated.cache)
    processes = [start(calibrated, name) for name in (FINE_TUNE, FINE_TUNE, BASE)]
    ends = [(*process.communicate(), process.returncode) for process in processes]
    reports = [json.loads(out) for out, _, _ in ends if out]

    assert [0, 0, 0] == [code for _, _, code in ends], ends
    assert 0 == min(report["actions_run"] for report in reports[:2])
    assert reference == contents(calibrated.out / FINE_TUNE)


# --- interruption --------------------------------------------------------------------------------


def statistics(project: Project) -> int:
    """How many layers are calibrated, by the statistics that the cache holds."""
    return sum(size in (32, 28) for size in blob_sizes(project))


def until_layer(project: Project, process: subprocess.Popen[str], layer: int) -> None:
    """Wait until the forward pass of `layer` is under way."""
    while statistics(project) < layer:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


def children(pid: int) -> list[int]:
    """The live processes that `pid` started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(") ")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are not in /proc")
def test_a_killed_calibration_goes_on_where_it_was(
    calibrated: Project, reference: dict[str, bytes], ran: Ran
) -> None:
    """kill -9 in a layer: those before it stay done, and the result is an undisturbed build's."""
    shutil.rmtree(calibrated.cache)
    process = start(calibrated, FINE_TUNE)
    until_layer(calibrated, process, 2)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = statistics(calibrated)
    left = list((calibrated.cache / "partial").glob("work-*"))
    made = ran(calibrated, FINE_TUNE)

    assert 2 <= done
    # One that had put away its maxima, and not yet the rest, is not done.
    assert made[FORWARD] in (4 - done, 5 - done)
    assert 1 == len(left)
    assert [] == list((calibrated.cache / "partial").iterdir())
    assert reference == contents(calibrated.out / FINE_TUNE)
    assert workers
    # Each ends on its own when it learns that nobody waits for it.
    patience = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < patience, "workers live on"
        time.sleep(0.05)


def test_ctrl_c_ends_a_calibration_without_a_word_too_many(calibrated: Project) -> None:
    """The terminal sends it to the workers as well, which end at once and say nothing."""
    shutil.rmtree(calibrated.cache)
    process = start(calibrated, FINE_TUNE)
    until_layer(calibrated, process, 1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert 130 == process.returncode
    assert "Traceback" not in err
    assert 1 <= statistics(calibrated)


# --- tokens --------------------------------------------------------------------------------------

ROLES = {"human": "user", "gpt": "assistant"}
COUNT, LENGTH = 5, 64


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The demo's, as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "qwen3.6-27b")


def rows() -> list[dict[str, Any]]:
    """Conversations as ShareGPT spells them, the first with tools."""
    lines = (DEMO / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:COUNT]]


def messages(row: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}
        for turn in row["conversations"]
    ]


def tokens_of(dataset: Path, tokenizer: Any) -> list[list[int]]:
    from carnice_build.calibration.tokenizing import tokenize

    params = {
        "samples": COUNT,
        "length": LENGTH,
        "roles": ROLES,
        "template": tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,
        "rows": dataset.suffix[1:],
    }
    content = (DEMO / "qwen3.6-27b" / "tokenizer.json").read_bytes()
    return tokenize(params, np.frombuffer(content, np.uint8), str(dataset))


def write_lines(path: Path, table: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return path


def write_parquet(path: Path, table: list[dict[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


CHATS = {
    "conversations": lambda row: row,
    "messages": lambda row: {"messages": messages(row), "tools": row["tools"]},
    "tools as text": lambda row: {"messages": messages(row), "tools": json.dumps(row["tools"])},
    "no tools": lambda row: {"messages": messages(row)},
}


@pytest.mark.parametrize("what", CHATS)
def test_conversations_give_the_tokens_of_apply_chat_template(
    tmp_path: Path, tokenizer: Any, what: str
) -> None:
    """However a row spells its turns and tools, in .jsonl and in .parquet."""
    expected = [
        tokenizer.apply_chat_template(
            messages(row),
            tools=None if what == "no tools" else row["tools"] or None,
            return_dict=False,
        )[:LENGTH]
        for row in rows()
    ]
    table = [CHATS[what](row) for row in rows()]
    found = [
        tokens_of(write_lines(tmp_path / "a.jsonl", table), tokenizer),
        tokens_of(write_parquet(tmp_path / "a.parquet", table), tokenizer),
    ]

    assert [expected] * 2 == found


TEXTS = [
    "Plain text.",
    "  Zwei Wörter, und\tmehr  ",
    "123 + 456 = 579",
    "日本語",
    "<think> a </think>",
]


def test_texts_give_the_tokens_of_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    """A `text` in .jsonl and .parquet, or a line of .txt, is tokenized as it is."""
    expected = [tokenizer(text).input_ids for text in TEXTS]
    table = [{"text": text} for text in TEXTS]
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    found = [
        tokens_of(write_lines(tmp_path / "a.jsonl", table), tokenizer),
        tokens_of(write_parquet(tmp_path / "a.parquet", table), tokenizer),
        tokens_of(tmp_path / "a.txt", tokenizer),
    ]

    assert [expected] * 3 == found
