"""A folder that is served with several profiles: each has a folder of its own below serve/."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from serving_cases import AWQ40B, spec_of

from carnice_build.checkpoint.checkpoint import is_plain_path
from carnice_build.recipe.schema import PackageSpec
from carnice_build.serving.render import serve_all, serve_files

BOTH = ("w4a16-vllm", "w4a16-v100")
SPECS = [spec_of(profile) for profile in BOTH]


def checked(serve: Any) -> PackageSpec:
    """A recipe's section `package` with this `serve`."""
    return PackageSpec.model_validate({"serve": serve})


def test_one_section_may_stand_without_a_list() -> None:
    """A name, a section, and a list of either mean the same."""
    name = BOTH[0]

    assert (spec_of(name),) == checked(name).serve
    assert (
        checked(name)
        == checked([name])
        == checked({"profile": name})
        == checked([{"profile": name}])
    )
    assert tuple(SPECS) == checked(list(BOTH)).serve
    assert () == checked([]).serve


@pytest.mark.parametrize(
    ("serve", "location"),
    [
        ({"profile": "x", "lunches": {}}, ("serve", "lunches")),
        (["x", {"profile": "x", "lunches": {}}], ("serve", 1, "lunches")),
        ({"profile": "x", "launches": {"a": {"port": 0}}}, ("serve", "launches", "a", "port")),
        ([1], ("serve", 0)),
        (None, ("serve",)),
    ],
)
def test_an_error_is_where_it_was_written(serve: Any, location: tuple[str | int, ...]) -> None:
    """One error, with a position in the list only where there is a list."""
    with pytest.raises(ValidationError) as caught:
        checked(serve)
    (error,) = caught.value.errors()

    assert location == error["loc"]


def test_an_editor_accepts_one_and_several() -> None:
    """The schema allows a section, which may be a name, and an array of such."""
    schema = PackageSpec.model_json_schema()
    one, several = schema["properties"]["serve"]["anyOf"]

    assert {"$ref": "#/$defs/ServeSpec"} == one
    assert {"type": "array", "items": one} == several


def test_files_of_several_profiles_do_not_meet() -> None:
    """Each profile's are those that it has alone, below serve/<profile>/, in plain places."""
    files = serve_all(SPECS, AWQ40B)
    alone = [serve_files(spec, AWQ40B) for spec in SPECS]

    assert 1 + sum(map(len, alone)) == len(files)
    assert all(map(is_plain_path, files))
    for profile, expected in zip(BOTH, alone, strict=True):
        for name in ("request.sh", *(name for name in expected if name.endswith(".sh"))):
            name = name.removeprefix("serve/")

            found = files[f"serve/{profile}/{name}"].replace(b"../..", b"..")
            found = found.replace(f"serve/{profile}/".encode(), b"serve/")
            assert expected[f"serve/{name}"] == found


def test_one_section_stays_in_serve() -> None:
    """A list of one makes the files of that one alone."""
    assert serve_files(SPECS[0], AWQ40B) == serve_all(SPECS[:1], AWQ40B)


@pytest.mark.parametrize("profile", BOTH)
def test_paths_follow_the_folder(profile: str) -> None:
    """Compose mounts the model from two folders up, and pages name files where they are."""
    files = serve_all(SPECS, AWQ40B)
    compose = files[f"serve/{profile}/compose.yaml"].decode()
    page = files[f"serve/{profile}/README.md"].decode()

    for service in yaml.safe_load(compose)["services"].values():
        assert ["../..:/model:ro"] == service["volumes"]
    assert f"-f serve/{profile}/compose.yaml up" in " ".join(compose.split()).replace("# ", "")
    assert f"`docker compose -f serve/{profile}/compose.yaml up" in page
    assert "| `hermes-cli-config.yaml` |" in page


def test_the_page_above_leads_to_each() -> None:
    """serve/README.md lists the folders with what they are for and their launches."""
    page = serve_all(SPECS, AWQ40B)["serve/README.md"].decode()

    assert "[`w4a16-vllm/`](w4a16-vllm/README.md)" in page
    assert "| W4A16 (compressed-tensors) on two V100 cards with the 1Cat fork of vLLM |" in page
    assert "| `safe, longer, ceiling` |" in page
