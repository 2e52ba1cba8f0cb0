"""GGUF files in a remote: pushed as they are published, fetched whole or tensor by tensor."""

from __future__ import annotations

import pytest
from gguf_project import gap, stand_in
from remotes import Team
from tiny import contents

pytest_plugins = ["remotes"]

RECIPE = """\
extends: _base/carnice-vision-mtp.yaml
variant: {name}
description: A
quantize: {{format: gguf, mix: Q8_0{rules}}}
"""


@pytest.fixture
def shared(team: Team) -> Team:
    """Machine `one` has built a GGUF and pushed it."""
    stand_in(team.project)
    team.project.recipe("plain", RECIPE.format(name="plain", rules=""))
    team.build("one", "plain", push=True)
    return team


def test_objects_are_the_published_files(shared: Team) -> None:
    """Byte for byte, what lies between tensors too."""
    published = {
        path.read_bytes()
        for path in (shared.project.root / "one" / "build" / "plain").glob("*.gguf")
    }

    assert 2 == len(published)
    assert published == {path.read_bytes() for path in shared.objects("packs")}


def test_a_second_machine_computes_nothing(shared: Team) -> None:
    """It fetches the files, and has the same folder, of packs of the same names."""
    built = shared.build("two", "plain")
    one, two = (
        {
            path.name: path.stat().st_nlink
            for path in (shared.project.root / name).glob("cache/packs/*")
        }
        for name in ("one", "two")
    )

    assert (0, True) == built.counts
    assert shared.output("one") == shared.output("two")
    assert one == two == dict.fromkeys(one, 2)


def test_one_tensor_is_computed_and_the_rest_fetched(shared: Team) -> None:
    """In a file whose header is another, so that every tensor lies elsewhere."""
    rules = ', rules: [{match: "*.layers.3.mlp.down_proj", type: Q4_0}]'
    shared.project.recipe("ruled", RECIPE.format(name="ruled", rules=rules))
    alone = shared.build("alone", "ruled", remote="")
    built = shared.build("two", "ruled")

    assert 1 == built.result.actions_run < alone.result.actions_run
    assert shared.output("alone") == shared.output("two")


@pytest.mark.parametrize("where", ["tensor", "gap", "header"])
def test_what_was_changed_on_the_way_is_not_published(shared: Team, where: str) -> None:
    """In a tensor, between two, or in what the file says of the model: the folder is the same."""
    changed = 0
    for path in shared.objects("packs"):
        content = bytearray(path.read_bytes())
        place = {"tensor": len(content) - 200, "gap": gap(path), "header": 200}[where]
        content[place] ^= place > 0
        changed += place > 0
        path.chmod(0o644)
        path.write_bytes(content)
    shared.build("two", "plain")

    assert changed > 0
    assert contents(shared.project.root / "one" / "build") == contents(
        shared.project.root / "two" / "build"
    )
