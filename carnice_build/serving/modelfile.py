"""serve/Modelfile: what `ollama create` makes a model of, from the same file."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import Launch
from carnice_build.serving.place import Place
from carnice_build.serving.sampling import launch_sampling

_PARAMETERS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""What Ollama calls what requests say of sampling."""

CONTEXT = 32_768
"""Tokens that Ollama makes room for; its own default is a few thousand, on small cards."""


def modelfile(launch: Launch, facts: ServingFacts, place: Place) -> str:
    """The file that lies at `place`, from which Ollama counts paths.

    Without a TEMPLATE: those are Go's, and Ollama finds its own for a chat template that it knows.
    """
    named = launch.served_name.rpartition("/")[2].lower()
    head = (
        f"ollama create {named} -f {place.folder}/Modelfile. There is no TEMPLATE: Ollama takes "
        "the one that it has for the chat template in the file."
    )
    lines = textwrap.wrap(head, 96, initial_indent="# ", subsequent_indent="# ")
    lines.append(f"FROM {place.model_folder}/{facts.model_file}")
    lines.append(f"PARAMETER num_ctx {min(CONTEXT, facts.max_positions)}")
    lines += [
        f"PARAMETER {_PARAMETERS[name]} {number:g}"
        for name, number in launch_sampling(launch, facts).items()
        if name in _PARAMETERS
    ]
    return "\n".join(lines) + "\n"
