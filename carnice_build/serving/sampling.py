"""How launches sample where a request does not say: the folder's own file, or an option over it."""

from __future__ import annotations

from collections.abc import Mapping

from carnice_build.serving.facts import ServingFacts
from carnice_build.serving.launches import OVERRIDE, Launch, sampling_of_folder


def launch_sampling(launch: Launch, facts: ServingFacts) -> dict[str, int | float]:
    """What one launch samples with where a request does not say.

    Names are those of vLLM's requests: temperature, top_p, top_k, min_p and penalties.
    What is in none of them is the engine's own: a temperature of 1 and no limits, for vLLM.
    """
    if launch.engine.sampling:
        options = {name: launch.flags.get(flag) for name, flag in launch.engine.sampling.items()}
        given = {
            name: option.value
            for name, option in options.items()
            if option is not None and isinstance(option.value, int | float)
        }
        return {**sampling_of_folder(launch.flags, facts), **given}
    override = launch.flags.get(OVERRIDE)
    return {
        **sampling_of_folder(launch.flags, facts),
        **(_numbers(override.value) if override else {}),
    }


def _numbers(value: object) -> Mapping[str, int | float]:
    if not isinstance(value, dict):
        return {}
    return {name: item for name, item in value.items() if type(item) in (int, float)}
