"""Where the CUDA decoder can be used, and what happens where it cannot; needs no GPU."""

import warnings

import jax
import pytest
from jax import export
from payloads import random_weights

from df11_jax import EXPORT_SAFETY_CHECKS, _cuda, _ffi, compress, decompress, published
from df11_jax.doctor import machine

BUILD = _cuda.Build((13, 0), ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)))


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((7, 5), False),
        ((8, 0), True),
        ((8, 7), True),  # as what was compiled for 8.6
        ((9, 0), True),
        ((10, 3), True),
        ((11, 0), False),  # newer than 10.0, but of another major number; older than the PTX
        ((12, 0), True),
        ((12, 1), True),
        ((13, 0), True),  # from PTX
    ],
)
def test_compute_capabilities(capability, runs):
    obstacle = _cuda.find_obstacle(BUILD, (13, 0), {"H100": (9, 0), "GPU": capability})
    assert (obstacle is None) == runs
    if not runs:
        assert f"GPU has compute capability {capability[0]}.{capability[1]}" in obstacle.reason


@pytest.mark.parametrize(
    ("driver", "runs"),
    [((12, 9), False), ((13, 0), True), ((13, 5), True), ((14, 0), True), (None, True)],
)
def test_drivers(driver, runs):
    obstacle = _cuda.find_obstacle(BUILD, driver, {"H100": (9, 0)})
    assert (obstacle is None) == runs
    if not runs:
        assert "needs NVIDIA driver 580 or newer, and the driver here is for CUDA 12.9" in str(
            obstacle
        )
        assert "an nvcc of CUDA 12 (12.8 or newer)" in obstacle.remedy


def test_kernels_of_newer_gpus_are_not_made_of_older_ptx():
    build = BUILD._replace(architectures=((8, 0),))
    assert _cuda.find_obstacle(build, None, {"RTX 4090": (8, 9)}) is None
    assert "9.0" in _cuda.find_obstacle(build, None, {"H100": (9, 0)}).reason
    build = BUILD._replace(architectures=((7, 5),))
    assert _cuda.find_obstacle(build, None, {"T4": (7, 5)}) is None
    assert "8.9" in _cuda.find_obstacle(build, None, {"RTX 4090": (8, 9)}).reason


def test_older_drivers_run_what_an_older_toolkit_compiled():
    build = BUILD._replace(cuda=(12, 8))
    assert build.driver == "NVIDIA driver 525 or newer"
    assert _cuda.find_obstacle(build, (12, 2), {"H100": (9, 0)}) is None
    assert _cuda.find_obstacle(build, (13, 0), {"H100": (9, 0)}) is None
    assert BUILD._replace(cuda=(15, 1)).driver == "an NVIDIA driver for CUDA 15.0 or newer"


def test_remedies_for_other_gpus():
    newer = _cuda.find_obstacle(BUILD, None, {"Thor": (11, 0)})
    assert "DF11_CUDA_ARCHITECTURES=110" in newer.remedy
    older = _cuda.find_obstacle(BUILD, None, {"T4": (7, 5)})
    assert "plain XLA" in older.remedy


def test_without_a_gpu_nothing_is_in_the_way():
    # Programs are then compiled for another machine.
    assert _cuda.find_obstacle(BUILD, (11, 0), {}) is None


@pytest.fixture
def too_old_a_gpu(monkeypatch):
    """What the decoders believe to be there; whether they have a library or not, it is no use."""

    def forget():
        _ffi.find_obstacle.cache_clear()
        _ffi.warn_if_slow.cache_clear()
        jax.clear_caches()

    monkeypatch.setattr(_cuda, "local_gpus", lambda: {"NVIDIA K80": (3, 7)})
    forget()
    yield
    monkeypatch.undo()
    forget()


def lower_for_cuda(decode, encoded):
    exported = export.export(
        jax.jit(decode), platforms=["cuda"], disabled_checks=EXPORT_SAFETY_CHECKS
    )(encoded)
    return exported.mlir_module()


@pytest.fixture(scope="module")
def encoded():
    weights = random_weights((64, 128))
    return {
        "native": (decompress, compress(weights), _ffi.DECODE_TARGET),
        "published": (
            published.decompress,
            published.encode_unit({"w": jax.device_get(weights)}),
            _ffi.PUBLISHED_DECODE_TARGET,
        ),
    }


@pytest.mark.parametrize("layout", ["native", "published"])
def test_lowered_for_cuda(layout, encoded):
    decode, array, target = encoded[layout]
    usable = _ffi.find_obstacle("cuda") is None
    assert (target in lower_for_cuda(lambda a: decode(a), array)) == usable


@pytest.mark.parametrize("layout", ["native", "published"])
def test_falls_back_with_one_warning(layout, encoded, too_old_a_gpu):
    decode, array, target = encoded[layout]
    why = r"On CUDA, .* plain XLA operations, .*(no CUDA decoder|K80 has).* `df11-jax doctor` says"
    with pytest.warns(RuntimeWarning, match=why) as caught:
        assert target not in lower_for_cuda(lambda a: decode(a), array)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert target not in lower_for_cuda(lambda a: decode(a), array)
        decode(array)
    assert _ffi.platforms() == ("cpu",)


def test_doctor_says_what_to_do(too_old_a_gpu):
    decoder, why, obstacle = machine._decoder_of("cuda")
    assert decoder == "plain XLA operations"
    assert why == obstacle.reason == _ffi.find_obstacle("cuda").reason
    assert obstacle.remedy
    assert machine._decoder_of("tpu")[2] is None
