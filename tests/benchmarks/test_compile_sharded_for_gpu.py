"""What XLA makes of sharded compressed blocks on several GPUs; compiles for them, needs none."""

import pytest
from gpu_compiler import needs_gpu_compiler, run_script

pytestmark = needs_gpu_compiler


@pytest.fixture(scope="module")
def programs():
    return {line["program"]: line for line in run_script("compile_sharded_for_gpu.py")}


@pytest.mark.parametrize("division", ["tensor parallel", "fsdp", "both"])
def test_devices_decode_their_shares_and_exchange_nothing_else(programs, division):
    plain, compressed = (programs[f"{division}, {kind}"] for kind in ("plain", "compressed"))
    assert compressed["decode_calls"] == 1
    assert compressed["weights"] < 0.67 * plain["weights"]
    assert compressed["exchanged"] == plain["exchanged"]
