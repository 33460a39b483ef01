import dataclasses
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

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
@pytest.mark.parametrize("stack", [(), (0,), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, stack):
    weights = np.asarray(random_weights(stack + shape))
    layout = make_layout(shape)
    payload = _host_codec.encode(weights, "w", layout)
    assert_same_bits(_host_codec.decode(payload, layout, "w"), weights)
    _host_codec.verify(payload, layout, "w")


def test_every_bit_pattern():
    weights = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
    layout = make_layout(weights.shape)
    payload = _host_codec.encode(weights, "w", layout)
    assert_same_bits(_host_codec.decode(payload, layout, "w"), weights)


def test_several_at_once():
    """Threads of Python, free ones or not, do not disturb each other."""
    layout = make_layout((130, 264))
    start = threading.Barrier(4)

    def come_back(seed):
        weights = np.asarray(random_weights((130, 264), seed))
        start.wait()
        for _ in range(10):
            payload = _host_codec.encode(weights, "w", layout)
            assert_same_bits(_host_codec.decode(payload, layout, "w"), weights)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_back, range(4)))


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
    for check in (_host_codec.decode, _host_codec.verify):
        with pytest.raises(ValueError, match=message):
            check(payload, layout, "w")


@pytest.mark.parametrize(
    "check", [_host_codec.decode, _host_codec.verify, _host_codec.payload_digest]
)
def test_parts_that_do_not_fit(check):
    layout = make_layout((384, 192))
    payload = list(_host_codec.encode(np.asarray(random_weights((384, 192))), "w", layout))
    with pytest.raises(ValueError, match="w: chunk_offsets is uint32"):
        check(payload, make_layout((512, 192)), "w")
    with pytest.raises(ValueError, match="w: not all slices have a header"):
        check(payload, make_layout((192 * 384,)), "w")
    payload[3] = payload[3][:-1]
    with pytest.raises(ValueError, match="w: exponents is uint32"):
        check(payload, layout, "w")


@pytest.mark.usefixtures("threads")
def test_views_of_a_mapped_file(tmp_path):
    weights = np.asarray(random_weights((2, 136, 64)))
    layout = make_layout((136, 64))
    payload = _host_codec.encode(weights, "w", layout)
    # One word before the first array: it and the others are aligned to words, and no more.
    path = tmp_path / "words"
    np.concatenate([np.zeros(1, np.uint32), *map(np.ravel, payload)]).tofile(path)
    words = np.memmap(path, np.uint32, "r", offset=4)
    sizes = np.cumsum([part.size for part in payload])[:-1]
    views = [
        np.asarray(view).reshape(part.shape)
        for view, part in zip(np.split(words, sizes), payload, strict=True)
    ]
    assert any(view.ctypes.data % 16 for view in views)
    assert not any(view.flags.writeable for view in views)
    _host_codec.verify(views, layout, "w")
    assert_same_bits(_host_codec.decode(views, layout, "w"), weights)
    digest = _host_codec.payload_digest(payload, layout, "w")
    assert _host_codec.payload_digest(views, layout, "w") == digest


@pytest.mark.parametrize("parts", [(), (2, 2)])
@pytest.mark.parametrize("stack", [(), (0,), (3,), (2, 2)])
@pytest.mark.parametrize("shape", [(0, 8), (2, 8), (130, 66), (512, 256)])
def test_digest(shape, stack, parts):
    weights = np.asarray(random_weights(stack + shape))
    layout = dataclasses.replace(make_layout(shape), parts=parts)
    payload = _host_codec.encode(weights, "w", layout)
    checksums = [
        int(payload[3][slice_index][begin])
        for slice_index in np.ndindex(payload[2].shape[:-1])
        for begin in payload[2][slice_index][:-1]
    ]
    expected = zlib.crc32(struct.pack(f"<{len(checksums)}I", *checksums))
    assert _host_codec.payload_digest(payload, layout, "w") == expected


def test_digest_tells_apart_what_codes_and_offsets_do_not():
    weights = np.asarray(random_weights((3, 384, 192)))
    layout = make_layout((384, 192))
    payload = _host_codec.encode(weights, "w", layout)
    found = {_host_codec.payload_digest(payload, layout, "w")}
    places = [(0, 0, 0), (1, 200, 100), (2, 383, 191)]
    for place in places:
        changed = weights.copy()
        changed.view(np.uint16)[place] ^= 0x8001  # sign and mantissa
        other = _host_codec.encode(changed, "w", layout)
        for i in range(3):
            np.testing.assert_array_equal(other[i], payload[i])
        found.add(_host_codec.payload_digest(other, layout, "w"))
    # The same slices in another order.
    other = [part[[1, 0, 2]] for part in payload]
    found.add(_host_codec.payload_digest(other, layout, "w"))
    assert len(found) == len(places) + 2


@pytest.mark.parametrize("chunk", [0, 4, 8])
@pytest.mark.parametrize("offset", ["equal", "before", "past the end", 2**31, 2**32 - 1])
def test_digest_reads_no_record_outside(offset, chunk):
    layout = make_layout((384, 192))
    weights = np.asarray(random_weights((2, 384, 192)))
    payload = [part.copy() for part in _host_codec.encode(weights, "w", layout)]
    offsets, words = payload[2], payload[3].shape[-1]
    begin = offsets[1, chunk]
    ends = {"equal": begin, "before": max(begin, 1) - 1, "past the end": words + 1}
    offsets[1, chunk + 1] = ends.get(offset, offset)
    with pytest.raises(ValueError, match=f"w: is corrupt: chunk {chunk} of slice 1"):
        _host_codec.payload_digest(payload, layout, "w")
