import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import assert_same_bits, random_weights

import df11_jax
from df11_jax import _compress_tensor, _cpu_library
from df11_jax._layout import make_layout, pack_header

BF16 = np.dtype(ml_dtypes.bfloat16)
RNG = np.random.default_rng(0)


def normal(*shape):
    return np.array(random_weights(shape))


def round_trip(weights, **options):
    array = df11_jax.compress(weights, **options)
    assert array.shape == np.shape(weights)
    assert_same_bits(df11_jax.decompress(array), weights)
    return array


@pytest.mark.parametrize("simd", _cpu_library.simd_levels())
def test_all_bit_patterns_on_every_instruction_set(simd):
    patterns = np.arange(65536, dtype=np.uint16).view(BF16)
    # Together with normal weights, so that some chunks are coded and some raw.
    weights = np.concatenate([normal(100_000), patterns, normal(100_000), patterns[::-1]])
    array = df11_jax.compress(weights)
    try:
        _cpu_library.use_simd(simd)
        assert_same_bits(df11_jax.decompress(array), weights)
    finally:
        _cpu_library.use_simd(_cpu_library.simd_levels()[-1])


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (0,),
        (3, 0, 5),
        (1,),
        (1, 1),
        (7, 9),
        (63,),
        (64,),
        (65,),
        (8191,),
        (8192,),
        (8193,),
        (127, 64),
        (128, 64),
        (129, 64),
        (128, 72),
        (144, 448),
        (5, 6, 7, 8),
        (2, 1, 2, 1, 2, 1, 2, 64),
        (3001, 1024),  # large enough to be written past the caches
    ],
)
@pytest.mark.parametrize("kind", ["normal", "noise", "zeros"])
def test_shapes(shape, kind):
    if kind == "normal":
        weights = normal(*shape)
    elif kind == "noise":
        weights = RNG.integers(0, 65536, shape, dtype=np.uint16).view(BF16)
    else:
        weights = np.zeros(shape, BF16)
    round_trip(weights)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.lists(st.integers(0, 70), max_size=3),
    exponents=st.integers(1, 256),
    stack_axes=st.integers(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_any_distribution(seed, shape, exponents, stack_axes):
    rng = np.random.default_rng(seed)
    used = rng.permutation(256)[:exponents]
    weights = rng.choice(used, size=shape, p=rng.dirichlet(np.full(exponents, 0.2)))
    weights = weights.astype(np.uint16) << 7 | rng.integers(0, 2, shape).astype(np.uint16) << 15
    weights = (weights | rng.integers(0, 128, shape).astype(np.uint16)).view(BF16)
    round_trip(weights, stack_axes=min(stack_axes, len(shape)))


def test_stacks():
    weights = normal(3, 2, 130, 64)
    # Slices of very different statistics, and so of different lengths.
    weights[1] *= np.float32(0)
    weights[2, 0] = RNG.integers(0, 65536, (130, 64), dtype=np.uint16).view(BF16)
    array = round_trip(weights, stack_axes=2)
    assert array.stack_shape == (3, 2)
    assert array.slice_shape == (130, 64)
    assert_same_bits(df11_jax.decompress(array[2][0]), weights[2, 0])
    assert round_trip(weights[:0], stack_axes=1).stack_shape == (0,)


def test_size():
    def bits_per_weight(size):
        array = df11_jax.compress(normal(size).reshape(2048, -1), verify=False)
        return 8 * array.compressed_nbytes / array.size

    assert bits_per_weight(2**23) < 10.65
    assert bits_per_weight(2**22) < 10.69  # in chunks of half the size
    # What does not compress costs a record's two words a chunk, the tables, and padding.
    noise = RNG.integers(0, 65536, (2048, 512), dtype=np.uint16).view(BF16)
    assert df11_jax.compress(noise).compressed_nbytes < 1.004 * noise.nbytes


def test_threads_give_the_same_bytes():
    weights = normal(5, 700, 256)
    one = df11_jax.compress(weights, threads=1, stack_axes=1)
    for threads in (2, 3, 8):
        other = df11_jax.compress(weights, threads=threads, stack_axes=1)
        for a, b in zip(one.payload, other.payload, strict=True):
            np.testing.assert_array_equal(a, b)


def test_threads_are_one_or_more():
    weights = normal(2, 64)
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"threads is {threads}, expected at least 1"):
            df11_jax.compress(weights, threads=threads)
    with pytest.raises(TypeError, match="threads: expected an integer or None, got 'all'"):
        df11_jax.compress_params({"a": weights}, min_size=0, threads="all")


def test_large_indices():
    # 2^31 weights do not fit a test; the arithmetic that places them is the same for a chunk in
    # the middle of a slice that large, whose start overflows 32 bits.
    view = make_layout((2**18, 2**15)).view
    assert view.size == 2**33
    assert view.chunks == 2**20
    assert view.sign_mantissa_words == 2**31


class TestInputs:
    def test_jax_array_stays_on_its_device(self):
        weights = jnp.asarray(normal(300, 64))
        array = round_trip(weights)
        assert array.header.devices() == weights.devices()

    def test_non_contiguous(self):
        weights = normal(300, 128)
        round_trip(weights[:, ::2])
        round_trip(weights.T)
        round_trip(weights[::-1])

    def test_reads_where_it_lies(self):
        array = jnp.asarray(normal(300, 64))
        weights, *_ = _compress_tensor.as_weights(array, "array", cast=False)
        assert weights.ctypes.data == array.unsafe_buffer_pointer()
        weights, *_ = _compress_tensor.as_weights(np.asarray(array), "array", cast=False)
        assert weights.ctypes.data == array.unsafe_buffer_pointer()

    def test_placement(self):
        first, second = jax.devices("cpu")[:2]
        weights = normal(300, 64)
        with jax.default_device(second):
            array = jnp.asarray(weights)
            assert df11_jax.compress(weights).header.devices() == {second}
        for uncommitted in (weights, jnp.asarray(weights), array):
            small = df11_jax.compress(uncommitted)
            assert not small.header.committed
            assert small.header.devices() == jnp.asarray(uncommitted).devices()
        moved = df11_jax.compress(jax.device_put(weights, second))
        assert moved.header.devices() == {second}
        assert moved.header.committed
        on_host = jax.sharding.SingleDeviceSharding(second, memory_kind="pinned_host")
        moved = df11_jax.compress(jax.device_put(weights, on_host))
        assert {array.sharding for array in moved.payload} == {on_host}
        mesh = jax.sharding.Mesh(np.array([first, second]), ("rows",))
        split = jax.device_put(weights, jax.NamedSharding(mesh, jax.P("rows")))
        assert round_trip(split).sharding.is_equivalent_to(split.sharding, 2)

    def test_beside_a_mesh(self):
        # What is made under a mesh without a sharding is on all of its devices.
        array = jnp.asarray(normal(64, 64))
        mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("rows",))
        x = jax.device_put(normal(2, 64), jax.NamedSharding(mesh, jax.P("rows")))
        with jax.set_mesh(mesh):
            small = df11_jax.compress(array)
            product = jax.jit(lambda a, x: x @ a)
            assert_same_bits(product(small, x), product(array, x))

    def test_of_a_constant_while_tracing(self):
        array = jnp.asarray(normal(64, 64))
        assert_same_bits(jax.jit(lambda: df11_jax.decompress(df11_jax.compress(array)))(), array)

    def test_read_only(self):
        weights = normal(300, 64)
        weights.flags.writeable = False
        round_trip(weights)

    @pytest.mark.parametrize(
        "dtype",
        [
            np.float32,
            np.float16,
            np.uint16,
            ml_dtypes.float8_e4m3fn,
            ">f4",
            BF16.newbyteorder(">"),
        ],
    )
    def test_other_dtypes_are_refused(self, dtype):
        with pytest.raises(TypeError, match=r"array: expected bfloat16, got .*Cast it first"):
            df11_jax.compress(np.zeros((300, 64), dtype))

    def test_tracer_is_refused(self):
        with pytest.raises(TypeError, match=r"needs a concrete array.*outside of jit"):
            jax.jit(df11_jax.compress)(jnp.zeros((300, 64), jnp.bfloat16))

    def test_compressed_is_refused(self):
        with pytest.raises(TypeError, match="is compressed already"):
            df11_jax.compress(df11_jax.compress(normal(64)))

    def test_shapes_are_refused(self):
        with pytest.raises(TypeError, match="array: expected an array, got the shape of one"):
            df11_jax.compress(jax.ShapeDtypeStruct((256, 512), jnp.bfloat16))
        masked = np.ma.masked_array(normal(2, 64), mask=True)
        with pytest.raises(TypeError, match="array: expected an array, got a masked one"):
            df11_jax.compress(masked)

    def test_too_many_axes(self):
        with pytest.raises(ValueError, match=r"array: .* at most 8 dimensions"):
            df11_jax.compress(np.zeros((1,) * 9, BF16))
        with pytest.raises(ValueError, match="cannot take 2 stack axes"):
            df11_jax.compress(normal(64), stack_axes=2)

    @pytest.mark.parametrize("argument", ["stack_axes", "batch_axes", "row_axes"])
    def test_numbers_of_axes_are_integers(self, argument):
        weights = random_weights((2, 64, 128))
        with pytest.raises(TypeError, match=f"{argument}: expected an integer, got 1.0"):
            df11_jax.compress(weights, **{argument: 1.0})
        a = df11_jax.compress(weights, **{argument: np.int64(1)})
        assert a.layout == df11_jax.compress(weights, **{argument: 1}).layout

    def test_along_columns_is_true_or_false(self):
        with pytest.raises(TypeError, match="along_columns: expected True or False, got 2"):
            df11_jax.compress(random_weights((64, 128)), along_columns=2)

    def test_leaves_with_too_many_axes_stay(self):
        params = {"odd": np.zeros((1,) * 8 + (20000,), BF16), "even": normal(300, 64)}
        small = df11_jax.compress_params(params)
        assert small["odd"] is params["odd"]
        assert isinstance(small["even"], df11_jax.DF11Array)
        # The stack axis is not one of the eight.
        small = df11_jax.compress_params(params, stacked="odd")
        assert small["odd"].slice_shape == (1,) * 7 + (20000,)


class TestCompressParams:
    def params(self):
        return {
            "layers": {"kernel": normal(4, 128, 64), "norm": np.ones((4, 64), BF16)},
            "embedding": normal(500, 64),
            "head": np.ones((300, 100), np.float32),
            "noise": RNG.integers(0, 65536, (300, 100), dtype=np.uint16).view(BF16),
            "step": 3,
        }

    def test_what_is_compressed(self):
        params = self.params()
        small = df11_jax.compress_params(params, stacked="^layers/")
        assert isinstance(small["layers"]["kernel"], df11_jax.DF11Array)
        assert small["layers"]["kernel"].stack_shape == (4,)
        assert isinstance(small["embedding"], df11_jax.DF11Array)
        assert small["embedding"].stack_shape == ()
        # Small, of another type, incompressible, not an array: untouched.
        for name in ("head", "noise", "step"):
            assert small[name] is params[name]
        assert small["layers"]["norm"] is params["layers"]["norm"]
        back = df11_jax.decompress_params(small)
        assert_same_bits(back["layers"]["kernel"], params["layers"]["kernel"])
        assert_same_bits(back["embedding"], params["embedding"])
        assert back["head"] is params["head"]
        again = df11_jax.compress_params(small)
        assert again["embedding"] is small["embedding"]

    def test_filters(self):
        params = self.params()

        def compressed(**options):
            tree = df11_jax.compress_params(params, **options)
            leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, df11_jax.DF11Array))
            return sum(isinstance(leaf, df11_jax.DF11Array) for leaf in leaves)

        assert compressed() == 2
        assert compressed(include="embed") == 1
        assert compressed(min_size=500 * 64 + 1) == 1
        assert compressed(predicate=lambda path, leaf: path == "layers/kernel") == 1
        assert compressed(predicate=lambda path, leaf: leaf.ndim == 2) == 1

    def test_a_scalar_beside_stacks(self):
        params = {"kernel": normal(3, 64, 64), "scale": jnp.ones((), BF16)}
        small = df11_jax.compress_params(params, stacked=".", min_size=0)
        assert small["kernel"].stack_shape == (3,) and small["scale"] is params["scale"]

    def test_cast(self):
        weights = RNG.standard_normal((300, 64), dtype=np.float32)
        for array in (weights, weights.astype(np.float16), weights.astype(">f4")):
            small = df11_jax.compress_params({"w": array}, cast=True)["w"]
            assert_same_bits(df11_jax.decompress(small), array.astype(BF16))
        integers = {"w": np.zeros((300, 64), np.int32)}
        assert df11_jax.compress_params(integers, cast=True)["w"] is integers["w"]

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_a_model_of_another_type(self, dtype):
        # Nothing is compressed, which nobody would see.
        params = {"a": np.ones((300, 64), dtype), "b": jnp.ones((300, 64), dtype), "c": np.ones(3)}
        nbytes = 2 * params["a"].nbytes
        message = rf"compress_params compressed nothing: .* 2 leaves \({nbytes / 1024:g} KiB\) are "
        with pytest.warns(UserWarning, match=message + np.dtype(dtype).name) as found:
            small = df11_jax.compress_params(params)
        assert found[0].filename == __file__ and len(found) == 1
        assert small["a"] is params["a"] and small["b"] is params["b"]
        with pytest.warns(UserWarning, match="1 leaf .* is float"):
            df11_jax.compress_params(params, include="a")
        # What did not get smaller is no reason to be silent.
        with pytest.warns(UserWarning, match="2 leaves"):
            df11_jax.compress_params(params | {"noise": self.params()["noise"]})

    def test_nothing_to_warn_of(self):
        wide = np.ones((300, 64), np.float32)
        for params, options in (
            ({}, {}),
            ({"small": wide[0], "integers": np.ones((300, 64), np.int32)}, {}),
            ({"key": jax.random.key(0), "text": "a"}, {}),
            ({"noise": self.params()["noise"]}, {}),
            ({"router": wide, "rest": df11_jax.compress(normal(300, 64))}, {}),
            ({"router": wide, "rest": normal(300, 64)}, {}),
            ({"a": wide, "b": wide[0]}, {"include": "b"}),
            ({"a": wide}, {"predicate": lambda path, leaf: leaf.dtype == BF16}),
            ({"a": wide}, {"min_size": wide.size + 1}),
        ):
            df11_jax.compress_params(params, **options)  # warnings are errors here

    def test_errors_name_the_leaf(self):
        params = {"a": {"b": np.zeros((20000,), BF16)}}
        with pytest.raises(TypeError, match="a/b: compression runs on the host"):
            jax.jit(df11_jax.compress_params)(params)
        for argument in ("include", "stacked"):
            with pytest.raises(ValueError, match=rf"{argument}: '\(' is not a regular expression"):
                df11_jax.compress_params(params, **{argument: "("})
            with pytest.raises(TypeError, match=rf"{argument}: expected a regular .* got \['a'\]"):
                df11_jax.compress_params(params, **{argument: ["a"]})
        with pytest.raises(
            TypeError, match=r"expected a bfloat16 array, got dict\. compress_params"
        ):
            df11_jax.compress(params)
        deleted = jnp.asarray(params["a"]["b"])
        deleted.delete()
        with pytest.raises(RuntimeError, match="deleted") as raised:
            df11_jax.compress_params({"a": {"b": deleted}})
        assert raised.value.__notes__ == ["df11_jax: while compressing the leaf a/b"]

    def test_other_leaves_stay(self):
        leaves = {
            "key": jax.random.split(jax.random.key(0), 20000),
            "shape": jax.ShapeDtypeStruct((20000,), jnp.bfloat16),
            "text": "text",
        }
        small = df11_jax.compress_params(leaves, cast=True)
        assert all(small[name] is leaves[name] for name in leaves)

    def test_interruption_leaves_the_original(self):
        params = self.params()
        before = jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), params)

        def interrupt(path, leaf):
            if path == "layers/kernel":
                raise KeyboardInterrupt
            return True

        with pytest.raises(KeyboardInterrupt):
            df11_jax.compress_params(params, predicate=interrupt)
        assert jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), params) == before

    def test_progress(self, capsys, monkeypatch):
        monkeypatch.setattr("df11_jax._progress._INTERVAL", 0)
        df11_jax.compress_params(self.params(), progress=True)
        shown = capsys.readouterr().err
        assert "100%" in shown
        df11_jax.compress_params(self.params())
        assert not capsys.readouterr().err


def test_verification_finds_a_difference():
    weights = normal(2, 300, 64)
    bits = weights.view(np.uint16).reshape(2, -1)
    for along_columns in (False, True):
        header = pack_header(make_layout((300, 64), along_columns=along_columns))
        words = list(_cpu_library.encode(bits, header, False, 2))
        assert _cpu_library.find_difference(bits, header, *words[1:], 2) == -1
        changed = bits.copy()
        changed[1, 12345] ^= 1
        assert _cpu_library.find_difference(changed, header, *words[1:], 2) == 300 * 64 + 12345


def test_peak_host_memory(tmp_path):
    """No more than the original, the result, and what one leaf needs at a time."""
    program = """
import resource, numpy as np, ml_dtypes, jax, df11_jax

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

rng = np.random.default_rng(0)
block = (rng.standard_normal(2**20, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
params = {f"leaf{i}": np.tile(block, 16).reshape(-1, 1024) for i in range(8)}
df11_jax.compress_params({"warm up": params["leaf0"][:64]})
before = peak()
small = df11_jax.compress_params(params)
extra = peak() - before - df11_jax.size_report(small).nbytes
print(extra / params["leaf0"].nbytes)
"""
    # Not in the source tree, whose package has no compiled library.
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    # The leaf's result once more, while it moves to the device.
    assert float(run.stdout) < 1.0
