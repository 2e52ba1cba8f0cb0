"""Every format in the engine that serves it: `make test-engines`.

One engine runs at a time; each needs half a minute to start and 2.8 GB.
A test takes some two minutes on two quiet cores.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY
from unquantized import twin_launch, write_twin

from carnice_build.commands.build import build_variants
from carnice_build.commands.options import Options
from carnice_build.commands.plan import plan_variants
from carnice_build.commands.verify import VerifySettings, verify_variants
from carnice_build.engines import llama_cpp
from carnice_build.engines.check import EngineSettings, check_engine, prepare_engine
from carnice_build.system import peak_memory
from carnice_build.verification.result import Check, Outcome

pytestmark = pytest.mark.engine

FOR_VLLM = (
    "nvfp4-text-mtp",
    "qwen-nvfp4-text-mtp",
    "fp8-modelopt",
    "mxfp8-modelopt",
    "nvfp4-fp8-attention",
    "fp8-dynamic",
    "fp8-static",
    "mxfp8",
    "mxfp8a16",
    "nvfp4-ct",
    "int4-autoround",
    "int4-bf16-mtp",
    "int4-rtn",
    "w4a16-awq",
    "w4a16-awq-minmax",
    "w4a16-gptq",
    "w4a16-rtn",
    "w4a16",
    "w8a8",
)
FOR_MLX = ("mlx-6bit", "mlx-4bit", "mlx-mixed_3_6")
FOR_LLAMA_CPP = ("gguf-q4_k_m", "gguf-q8_0", "gguf-bf16")
TEXT = REPOSITORY / "demo" / "heldout.txt"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """One cache for all builds."""
    root = tmp_path_factory.mktemp("engines")
    return Options(recipes=REPOSITORY / "recipes", out=root / "build", cache=root / "cache")


@pytest.fixture(autouse=True)
def told(request: pytest.FixtureRequest) -> Iterator[None]:
    """Say what each test took."""
    start = time.monotonic()
    yield
    peak = peak_memory(resource.RUSAGE_CHILDREN) / 1e9
    print(f"{request.node.name}: {time.monotonic() - start:.0f} s, {peak:.1f} GB so far")


def served(variant: str, engine: str, options: Options) -> Check:
    """What the engine says of the variant, beside our own figures."""
    build_variants([variant], options)
    settings = VerifySettings(engine=EngineSettings(engine))
    (result,) = verify_variants([variant], options, settings).variants
    check = result.checks[-1]
    print(f"\n{variant}: {check.summary}\n{json.dumps(check.details['answers'])}")
    return check


@pytest.mark.parametrize("variant", FOR_VLLM)
def test_vllm_serves_it(variant: str, options: Options) -> None:
    """It loads, reads the text as we do, drafts as we do, and its parsers find what is written."""
    check = served(variant, "vllm", options)

    assert [] == list(check.problems)
    assert Outcome.PASSED is check.outcome
    assert ["1024", "256"] == sorted(check.details["perplexity"])


@pytest.mark.parametrize("variant", FOR_MLX)
def test_mlx_lm_serves_it(variant: str, options: Options) -> None:
    """It loads, and the parser that mlx-lm finds by the template finds what is written."""
    check = served(variant, "mlx-lm", options)

    assert [] == list(check.problems)


@pytest.mark.skipif(llama_cpp.find_program(llama_cpp.SERVER) is None, reason="no llama.cpp")
@pytest.mark.parametrize("variant", FOR_LLAMA_CPP)
def test_llama_cpp_serves_it(variant: str, options: Options) -> None:
    """It loads, reads the text as we do, and finds the calls that are written."""
    check = served(variant, "llama.cpp", options)

    assert [] == list(check.problems)
    if llama_cpp.find_program(llama_cpp.PERPLEXITY):
        assert {"engine", "ours"} == check.details["second_halves"].keys()


def test_vllm_serves_the_source(options: Options, tmp_path: Path) -> None:
    """The same weights in BF16, which is what the others are compared with."""
    plan = plan_variants(["nvfp4-text-mtp"], options)
    (variant,) = plan.variants
    ready = prepare_engine(EngineSettings("vllm"), [variant])
    folder = write_twin(variant, tmp_path / "bf16")
    check = check_engine(ready, twin_launch(variant), folder, TEXT, None, [])
    print(f"\nBF16: {check.summary}\n{json.dumps(check.details['answers'])}")

    assert [] == list(check.problems)
