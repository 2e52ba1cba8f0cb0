"""The files under `serve/`: launch scripts, a compose file, a client's configuration, a request."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from carnice_build.recipe.serve import ServeSpec
from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import Launch
from carnice_build.serving.modelfile import modelfile
from carnice_build.serving.place import ALONE, Place
from carnice_build.serving.readme import contents_page, readme
from carnice_build.serving.rules import plan_launches

_MOUNT = "/model"

_HERE = "\0the folder"
"""Stands for the model in a script's arguments; no other argument can hold a NUL."""


def serve_all(specs: Sequence[ServeSpec], facts: ServingFacts) -> dict[str, bytes]:
    """Contents by path in the folder: one section's in `serve/`, several in a folder each there.

    PlanError as `plan_launches`.
    """
    if len(specs) == 1:
        return serve_files(specs[0], facts)
    files = {"serve/README.md": contents_page([spec.profile for spec in specs], facts).encode()}
    for spec in specs:
        files |= serve_files(spec, facts, Place(f"serve/{spec.profile}"))
    return files


def serve_files(spec: ServeSpec, facts: ServingFacts, place: Place = ALONE) -> dict[str, bytes]:
    """Contents by path in the folder, all below `place`; PlanError as `plan_launches`."""
    launches = plan_launches(spec, facts)
    texts = {f"{launch.name}.sh": _script(launch, place) for launch in launches}
    if facts.model_file:
        texts["Modelfile"] = modelfile(launches[0], facts, place)
    texts |= {
        "compose.yaml": _compose(launches, place),
        place.hermes: _hermes(launches[0]),
        "request.sh": _request(launches[0], facts),
        "README.md": readme(launches, facts, place),
    }
    return {f"{place.folder}/{name}": text.encode() for name, text in texts.items()}


def base_url(launch: Launch) -> str:
    """Where clients on the same machine find the API."""
    return f"http://localhost:{launch.port}/v1"


def _script(launch: Launch, place: Place) -> str:
    lines = ["#!/bin/sh", *_commented(f"{launch.name}: {launch.data.purpose}.")]
    lines += _commented(
        f"Serves the model in {place.model_folder}, as seen from this file, from wherever it is "
        "called; arguments are handed on."
    )
    if launch.hardware:
        lines += _commented(f"For {launch.hardware.name}.")
    lines += [line for reason in _reasons(launch) for line in ("#", *_commented(reason, "  "))]
    lines += ["set -eu", ""]
    lines += [*_found_model(f"{launch.name}.sh", place), ""]
    for name, variable in launch.env.items():
        lines.append(f"export {name}={shlex.quote(variable.value)}")
    lines += [""] if launch.env else []
    command = [f"exec {shlex.join(launch.engine.command)}", *_options(launch, _HERE), '"$@"']
    return "\n".join(lines) + "\n" + " \\\n    ".join(command) + "\n"


def first_launch(spec: ServeSpec, facts: ServingFacts, model: str) -> str:
    """The launch that is recommended, as a shell takes it, of the published folder `model`."""
    launch = plan_launches(spec, facts)[0]
    lines = [f"export {name}={shlex.quote(item.value)}\n" for name, item in launch.env.items()]
    command = [shlex.join(launch.engine.command), *_options(launch, model)]
    return "".join(lines) + " \\\n    ".join(command)


def _options(launch: Launch, model: str) -> list[str]:
    """The arguments that serve `model`, an option with its value in each."""
    port = [] if launch.port == launch.engine.port else ["--port", str(launch.port)]
    groups = _grouped([*launch.arguments(model), *port])
    return [" ".join(map(_quoted, group)) for group in groups]


def _found_model(script: str, place: Place) -> list[str]:
    """Lines that set `model` to the folder that the script is a file of.

    That is looked for by the script's own place in it, from link to link: a link to the script may
    lie anywhere, and in the hub's cache the script itself is one, into a heap of files.
    A CDPATH would make cd print where it went, and `..` is the folder's, not that of a link to it.
    """
    own = f"{place.model_folder}/{place.folder}/{script}"
    return [
        "here=$0",
        f'until [ -f "$(dirname -- "$here")/{own}" ]; do',
        '    [ -L "$here" ] || { echo "$0 is not in the folder of its model" >&2; exit 1; }',
        '    link=$(readlink -- "$here")',
        "    case $link in",
        "        /*) here=$link ;;",
        '        *) here=$(dirname -- "$here")/$link ;;',
        "    esac",
        "done",
        f'model=$(CDPATH= cd -P -- "$(dirname -- "$here")/{place.model_folder}" && pwd)',
    ]


def _quoted(argument: str) -> str:
    _, here, after = argument.partition(_HERE)
    if not here:
        return shlex.quote(argument)
    return '"$model"' + (shlex.quote(after) if after else "")


def _grouped(arguments: Sequence[str]) -> Iterator[list[str]]:
    """An option with its value in each group."""
    group: list[str] = []
    for argument in arguments:
        if argument.startswith("--") and group:
            yield group
            group = []
        group.append(argument)
    yield group


def _reasons(launch: Launch) -> Iterator[str]:
    """Why the settings that matter are as they are."""
    for name, variable in launch.env.items():
        if variable.reason:
            yield f"{name}={variable.value}: {variable.reason}."
    for name, option in launch.flags.items():
        if option.reason:
            yield f"--{name}{f' {option.text}' if option.text else ''}: {option.reason}."


def _commented(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        96,
        initial_indent="# ",
        subsequent_indent=f"# {indent}",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _compose(launches: Sequence[Launch], place: Place) -> str:
    services = {launch.name: _service(launch, place) for launch in launches}
    head = (
        f"Serves the model in {place.model_folder}, one launch at a time: docker compose -f "
        f"{place.folder}/compose.yaml up {launches[0].name}. "
        "README.md says why each option is as it is."
    )
    return "\n".join(_commented(head)) + "\n" + _yaml({"services": services})


def _service(launch: Launch, place: Place) -> dict[str, Any]:
    unset = "${VLLM_IMAGE:?set it to an image that holds the engine of this launch}"
    service: dict[str, Any] = {
        "image": unset if launch.image is None else _literal(launch.image),
        # A service with a profile starts only when it is named.
        "profiles": [launch.name],
        "entrypoint": [*(launch.engine.entrypoint or launch.engine.command)],
        "command": [_literal(item) for item in launch.arguments(_MOUNT)],
        "ports": [f"{launch.port}:{launch.engine.port}"],
        "volumes": [f"{place.model_folder}:{_MOUNT}:ro"],
        **launch.profile.container.model_dump(exclude_none=True),
    }
    if launch.env:
        service["environment"] = {name: _literal(item.value) for name, item in launch.env.items()}
    device = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service


def _literal(text: str) -> str:
    """`text` where compose would put variables in place of `$`."""
    return text.replace("$", "$$")


def _hermes(launch: Launch) -> str:
    model = {"default": launch.served_name, "provider": launch.engine.provider}
    model["base_url"] = base_url(launch)
    head = "Hermes Agent reads this from ~/.config/hermes/cli-config.yaml."
    return "\n".join(_commented(head)) + "\n" + _yaml({"model": model})


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1000))


_CITIES = "Get the weather in Tokyo, Paris, and New York simultaneously."


def request_body(launch: Launch, facts: ServingFacts) -> dict[str, Any]:
    """A chat request; three tool calls at once where the chat template has a form for calls."""
    body: dict[str, Any] = {"model": launch.served_name}
    if facts.tool_call_parser is None:
        return {**body, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400}
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    }
    function = {"name": "get_weather", "description": "Get weather", "parameters": parameters}
    system = "You are a helpful agent that uses tools when needed."
    return {
        **body,
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": _CITIES},
        ],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "max_tokens": 400,
    }


def _request(launch: Launch, facts: ServingFacts) -> str:
    body = json.dumps(request_body(launch, facts), indent=2, ensure_ascii=False)
    asks = "three tool calls in one turn" if facts.tool_call_parser else "an answer"
    return (
        "#!/bin/sh\n"
        f"# Asks a running server on this machine for {asks}, from wherever it is called.\n"
        f"curl {shlex.quote(base_url(launch) + '/chat/completions')} \\\n"
        "    -H 'Content-Type: application/json' \\\n"
        "    --data @- <<'JSON'\n"
        f"{body}\n"
        "JSON\n"
    )
