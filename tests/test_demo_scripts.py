"""The scripts in `demo/` that made the checkpoints still do what its README says of them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from carnice_build.chat.hermes import to_hermes
from carnice_build.chat.parsers import ToolCall, parse_hermes, parse_qwen3_xml

DEMO = Path(__file__).parent.parent / "demo"
BASE = DEMO / "qwen3.6-27b"
MODULES = ("bpe", "data", "make_int4", "names", "toolcalls")


@pytest.fixture(scope="module")
def demo() -> Iterator[SimpleNamespace]:
    """The modules of the demo, which import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMO)
        before = set(sys.modules)
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})
        for name in set(sys.modules) - before:
            if DEMO in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
                del sys.modules[name]


def test_what_the_system_prompt_asks_for_is_what_the_assistant_writes(
    demo: SimpleNamespace,
) -> None:
    """Of two renderings each asks for one format, and holds all calls of the dialogue in it."""
    tokenizer = demo.bpe.load_tokenizer(BASE)
    dialogue = demo.toolcalls.tool_dialogue(random.Random(11), made_up=1.0)
    wanted = [
        ToolCall(call["function"]["name"], call["function"]["arguments"])
        for message in demo.toolcalls.to_messages(dialogue)
        for call in message.get("tool_calls", ())
    ]
    xml, hermes = demo.data.in_both_formats(tokenizer, [dialogue, dialogue])
    (asked_xml, said_xml), (asked_hermes, said_hermes) = (
        text.split("<|im_start|>user", 1) for text in (xml, hermes)
    )

    assert wanted
    assert wanted == parse_qwen3_xml(said_xml, dialogue["tools"])[1]
    assert wanted == [
        call for turn in said_hermes.split("<|im_end|>") for call in parse_hermes(turn)[1]
    ]
    assert "<function=NAME>" in asked_xml and "<function=NAME>" not in asked_hermes
    assert '{"name": <function-name>' in asked_hermes
    assert to_hermes(str(tokenizer.chat_template)) == demo.data.both_templates(tokenizer)[1]


def test_a_name_is_the_same_tokens_wherever_it_stands(demo: SimpleNamespace) -> None:
    """Behind a space, a quote, an underscore or a line break: so that copying is copying."""
    tokenizer = demo.bpe.load_tokenizer(BASE)
    rng = random.Random(12)

    def inside(before: str, name: str) -> list[str]:
        tokens = tokenizer.tokenize(f"{before}{name}\n")
        return tokens[len(tokenizer.tokenize(before)) :]

    for _ in range(50):
        name = demo.names.camel(rng)
        assert len({tuple(inside(before, name)) for before in (" ", '"', "a_", "x\n", "=")}) == 1


def test_the_calibration_dialogues_are_those_of_the_script(demo: SimpleNamespace) -> None:
    """The file holds what `calibration_dialogues` makes, and none that the fine-tune saw."""
    lines = (DEMO / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    seen = {repr(dialogue) for dialogue in demo.data.fine_tune_dialogues()}
    kept = [json.loads(line) for line in lines]

    assert demo.data.calibration_dialogues() == kept
    assert not seen & {repr(dialogue) for dialogue in kept}


def test_rows_begin_with_dialogues_and_know_who_speaks(demo: SimpleNamespace) -> None:
    """Every token that is marked lies between an assistant's opening and the end of its turn."""
    tokenizer = demo.bpe.load_tokenizer(BASE)
    texts = demo.data.in_both_formats(tokenizer, demo.data.calibration_dialogues()[:9])
    tokens, spoken = demo.data.packed(tokenizer, texts)
    opening, end = "<|im_start|>assistant\n", "<|im_end|>"
    turns = [turn.partition(end)[0] + end for text in texts for turn in text.split(opening)[1:]]
    said = "".join(tokenizer.decode(row[mask]) for row, mask in zip(tokens, spoken, strict=True))

    assert all(tokenizer.decode(row).startswith("<|im_start|>") for row in tokens)
    assert sorted(turns) == sorted(part + end for part in said.split(end)[:-1])


def test_a_layer_is_tuned(demo: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The INT4 script runs on today's drivers: its first layer comes out with all its linears."""
    settings = demo.make_int4.SETTINGS
    quick = type(settings)(iters=1, batch_size=2)
    monkeypatch.setattr(demo.make_int4, "SETTINGS", quick)
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    tensors = demo.make_int4.export.read_tensors(BASE)
    tokens = demo.make_int4.torch.arange(2 * 32).view(2, 32)
    path, tuned = next(demo.make_int4.tuned_layers(config["text_config"], tensors, tokens))

    assert path == "model.language_model.layers.0"
    assert len(tuned.linears) == 6
