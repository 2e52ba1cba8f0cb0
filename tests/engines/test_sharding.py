"""Our arithmetic of models that are split over cards, against vLLM's own."""

from __future__ import annotations

import json
import subprocess

import pytest

from carnice_build.engines.check import EngineSettings
from carnice_build.engines.interpreter import engine_python
from carnice_build.serving.sharding import Split

pytestmark = pytest.mark.engine

SIZES = [(17408, 16), (17408, 128), (6144, 128), (384, 128), (25, 1), (48, 1)]
ASKED = """
import json, sys
sys.modules.update(dict.fromkeys(("torchvision", "torchaudio", "torchcodec")))
from vllm.distributed.utils import divide
from vllm.model_executor.layers.quantization.utils import marlin_utils
from vllm.model_executor.layers.vocab_parallel_embedding import pad_vocab_size

def fits(size, unit, cards):
    try:
        marlin_utils.verify_group_size_divides_partition(divide(size, cards), unit)
    except (AssertionError, ValueError):
        return False
    return True

sizes = json.loads(sys.argv[1])
found = [[n for n in range(1, 65) if fits(size, unit, n)] for size, unit in sizes]
print(json.dumps([found, [pad_vocab_size(size) for size in (2048, 248320, 151669)]]))
"""


def test_vllm_has_the_same_arithmetic() -> None:
    """Its own functions say of parts, groups and the padded vocabulary what ours do."""
    python = engine_python(EngineSettings("vllm").beside)
    run = subprocess.run(
        [str(python), "-c", ASKED, json.dumps(SIZES)], capture_output=True, check=True
    )
    fitting, padded = json.loads(run.stdout.splitlines()[-1])

    assert fitting == [
        [n for n in range(1, 65) if Split("", size, unit).refusal(n) is None]
        for size, unit in SIZES
    ]
    assert [2048, 248320, 151680] == padded
