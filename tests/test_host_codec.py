import ml_dtypes
import numpy as np
import pytest
from payloads import assert_same_bits, random_weights

from df11_jax import _host_codec
from df11_jax._layout import make_layout

SHAPES = [(), (0,), (1,), (63,), (65,), (0, 8), (127, 64), (129, 65), (3, 5, 264), (700, 200)]


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """The number of threads that encoding and decoding use."""
    monkeypatch.setattr(_host_codec, "available_threads", lambda: request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("stack", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, stack):
    weights = np.asarray(random_weights(stack + shape))
    layout = make_layout(shape)
    payload = _host_codec.encode(weights, "w", layout)
    assert_same_bits(_host_codec.decode(payload, layout, "w"), weights)


def test_every_bit_pattern():
    weights = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
    layout = make_layout(weights.shape)
    payload = _host_codec.encode(weights, "w", layout)
    assert_same_bits(_host_codec.decode(payload, layout, "w"), weights)


@pytest.mark.parametrize(
    ("part", "index", "message"),
    [
        (0, (1, 2), "w: not all slices have a header"),
        (1, (1, 20), "w: is corrupt: chunk 0 of slice 1"),
        (2, (1, 3), "w: is corrupt: chunk 2 of slice 1"),
        (3, (1, 50), "w: is corrupt: chunk 0 of slice 1"),
        (4, (1, -1), "w: is corrupt: chunk 8 of slice 1"),
    ],
)
@pytest.mark.usefixtures("threads")
def test_corruption_is_found(part, index, message):
    weights = np.asarray(random_weights((2, 384, 192)))
    layout = make_layout((384, 192))
    payload = [array.copy() for array in _host_codec.encode(weights, "w", layout)]
    payload[part][index] ^= 0x11
    with pytest.raises(ValueError, match=message):
        _host_codec.decode(payload, layout, "w")


def test_parts_that_do_not_fit():
    layout = make_layout((384, 192))
    payload = list(_host_codec.encode(np.asarray(random_weights((384, 192))), "w", layout))
    with pytest.raises(ValueError, match="w: chunk_offsets is uint32"):
        _host_codec.decode(payload, make_layout((512, 192)), "w")
    payload[3] = payload[3][:-1]
    with pytest.raises(ValueError, match="w: exponents is uint32"):
        _host_codec.decode(payload, layout, "w")
