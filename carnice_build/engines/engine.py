"""The engines: what each is called, which folders it serves, and how it is started for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from carnice_build.engines import llama_cpp
from carnice_build.engines.forced import ENVIRONMENT, options_on_processor
from carnice_build.errors import EngineError, nearest
from carnice_build.formats.library import Library
from carnice_build.planning.planner import VariantPlan
from carnice_build.serving.launches import Launch, resolve_launches

HOOKS = Path(__file__).parent / "hooks"
"""Is on PYTHONPATH of vLLM; see `hooks/sitecustomize.py`."""


@dataclass(frozen=True)
class Start:
    """How an engine is started: arguments after its command, variables, and the model's name."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    model: str
    drafts: int = 0
    """Tokens that it drafts a step."""


@dataclass(frozen=True)
class Engine:
    """A program that serves folders by OpenAI's protocol, started as `python -m module`.

    `package` is what must be importable for that; without a module it is llama.cpp's own program.
    It serves the folders that `libraries` compute.
    `launched` says that it is started by a launch, without which a folder does not do; `scores`
    that it tells how likely the tokens of a prompt are, and `counts` what becomes of its drafts.
    """

    name: str
    module: str
    package: str
    libraries: frozenset[Library]
    start: Callable[[Path, Launch | None, Mapping[str, str]], Start]
    launched: bool
    scores: bool
    counts: bool

    def command(self, executable: Path) -> list[str]:
        """What starts it, before all arguments."""
        return [str(executable), "-m", self.module] if self.module else [str(executable)]


def _start_vllm(folder: Path, launch: Launch | None, environment: Mapping[str, str]) -> Start:
    """As the launch says, but for what a processor forces."""
    assert launch is not None
    arguments = ["--model", str(folder), "--served-model-name", launch.served_name]
    for name, value in options_on_processor(launch).items():
        arguments += [f"--{name}"] if value is None else [f"--{name}", value]
    given = {name: variable.value for name, variable in launch.env.items()}
    forced = {name: value for name, (value, _) in ENVIRONMENT.items()}
    speculation = launch.flags.get("speculative-config")
    drafts = 0
    if speculation is not None and isinstance(speculation.value, dict):
        drafts = int(str(speculation.value.get("num_speculative_tokens", 0)))
    return Start(
        arguments,
        {**environment, **given, **forced, "PYTHONPATH": str(HOOKS)},
        launch.served_name,
        drafts,
    )


def _start_mlx_lm(folder: Path, launch: Launch | None, environment: Mapping[str, str]) -> Start:
    """The folder alone: it states all that the server needs."""
    # Any other name than this one would be loaded from the hub.
    own = {**environment, "HF_HUB_OFFLINE": "1"}
    own.pop("PYTHONPATH", None)
    return Start(["--model", str(folder)], own, "default_model")


def _start_llama_cpp(folder: Path, launch: Launch | None, environment: Mapping[str, str]) -> Start:
    """The server as the launch says, but for what a processor forces."""
    name = launch.served_name if launch else folder.name
    arguments, drafts = llama_cpp.arguments(folder, launch, name)
    return Start(arguments, environment, name, drafts)


VLLM = Engine(
    name="vllm",
    # The command `vllm` asks for package metadata of that name, which the build for CPUs lacks.
    module="vllm.entrypoints.openai.api_server",
    package="vllm",
    libraries=frozenset({Library.TRANSFORMERS}),
    start=_start_vllm,
    launched=True,
    scores=True,
    counts=True,
)
MLX_LM = Engine(
    name="mlx-lm",
    module="mlx_lm.server",
    package="mlx_lm",
    libraries=frozenset({Library.MLX_LM}),
    start=_start_mlx_lm,
    launched=False,
    scores=False,
    counts=False,
)
LLAMA_CPP = Engine(
    name="llama.cpp",
    module="",
    package="",
    libraries=frozenset({Library.LLAMA_CPP}),
    start=_start_llama_cpp,
    launched=False,
    scores=False,
    counts=True,
)
ENGINES = {engine.name: engine for engine in (VLLM, MLX_LM, LLAMA_CPP)}


def find_engine(name: str) -> Engine:
    """The engine of this name; EngineError names the nearest."""
    if name not in ENGINES:
        raise EngineError(
            f"there is no engine {name!r}",
            expected=" or ".join(ENGINES),
            nearest=nearest(name, ENGINES),
        )
    return ENGINES[name]


def check_fits(engine: Engine, variant: VariantPlan) -> None:
    """EngineError unless the engine serves folders of the variant's format."""
    library = variant.format.checks().library
    if library not in engine.libraries:
        fitting = [other.name for other in ENGINES.values() if library in other.libraries]
        raise EngineError(
            f"{engine.name} does not load it: its format is for {_READERS.get(library, library)}",
            where=variant.name,
            expected=f"--engine {fitting[0]}" if fitting else None,
        )
    if engine.launched and variant.serving is None:
        raise EngineError("it has no launches", where=variant.name, expected="package.serve")


_READERS = {Library.TRANSFORMERS: "vllm"}
"""Who serves what a library computes here, where that is somebody else."""


def launch_of(variant: VariantPlan) -> Launch | None:
    """The variant's recommended launch: the first of its first profile; None where it has none."""
    if variant.serving is None:
        return None
    return resolve_launches(variant.recipe.package.serve[0], variant.serving)[0]
