"""Targets, and leaves that change their form on the way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax_helpers import (
    abstract,
    assert_same_tree,
    assert_same_weights,
    compressed_leaves,
    compressed_params,
    plain_params,
    restore,
    run_python,
    save,
    save_plain,
)
from payloads import assert_same_bits, random_weights
from test_orbax_damage import flip_a_bit

import df11_jax
from df11_jax._array import is_df11
from df11_jax._layout import make_layout
from df11_jax.orbax import DF11Restore

STACKED = {"stacked": "^layers/"}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    path = tmp_path_factory.mktemp("compressed") / "x"
    save(path, compressed_params())
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "x"
    save_plain(path, plain_params())
    return path


def test_decompress(compressed):
    assert_same_tree(restore(compressed, decompress=True), plain_params())
    assert_same_tree(
        restore(compressed, abstract(compressed_params()), decompress=True), plain_params()
    )


def test_plain_target_decompresses(compressed):
    assert_same_tree(restore(compressed, abstract(plain_params())), plain_params())


def test_mixed_target(compressed):
    small, large = compressed_params(), plain_params()
    mixed = small | {"embedding": large["embedding"]}
    assert_same_tree(restore(compressed, abstract(mixed)), mixed)


def test_compress_on_the_way_in(plain):
    assert_same_tree(restore(plain, compress=STACKED), compressed_params())
    assert_same_tree(
        restore(plain, abstract(plain_params()), compress=STACKED), compressed_params()
    )


def test_arguments_of_compress_params(plain):
    small = restore(plain, compress={"include": "kernel", "min_size": 0})
    assert_same_tree(small, df11_jax.compress_params(plain_params(), include="kernel", min_size=0))
    with pytest.raises(TypeError, match="compress has 'stack', and compress_params no such"):
        restore(plain, compress={"stack": "."})


def test_cast_on_the_way_in(tmp_path):
    params = {"w": random_weights((128, 128)).astype(jnp.float32), "n": jnp.arange(20000)}
    save_plain(tmp_path / "x", params)
    expected = df11_jax.compress_params(params, cast=True)
    assert_same_tree(restore(tmp_path / "x", compress={"cast": True}), expected)
    target = abstract(jax.tree.map(lambda a: a, params))
    assert_same_tree(restore(tmp_path / "x", target, compress={"cast": True}), expected)
    with pytest.warns(UserWarning, match=r"DF11Restore compressed nothing: .* 1 leaf .* float32"):
        assert_same_tree(restore(tmp_path / "x", compress={}), params)
    with pytest.warns(UserWarning, match=r"DF11Save compressed nothing: .* 1 leaf .* float32"):
        save(tmp_path / "y", params, compress={})


def test_compressed_target_compresses(plain):
    """Into the stacks of the target."""
    small = compressed_params()
    assert_same_tree(restore(plain, abstract(small)), small)


@pytest.mark.parametrize("stored", ["compressed", "plain"])
def test_target_with_other_lengths(stored, request):
    path, small = request.getfixturevalue(stored), compressed_params()

    def target(words):
        def change(leaf):
            if not is_df11(leaf):
                return leaf
            shape = (*leaf.exponents.shape[:-1], leaf.exponents.shape[-1] + words)
            exponents = jax.ShapeDtypeStruct(shape, np.uint32, sharding=leaf.exponents.sharding)
            return dataclasses.replace(leaf, exponents=exponents)

        return jax.tree.map(change, small, is_leaf=is_df11)

    longer = restore(path, abstract(target(40)))
    for a, b in zip(compressed_leaves(longer), compressed_leaves(target(40)), strict=True):
        assert a.exponents.shape == b.exponents.shape
    assert_same_weights(longer, small)
    # No disagreement: how long the coded exponents are depends on the weights.
    assert_same_tree(restore(path, abstract(target(-400))), small)


def uneven_layers():
    """Layers of which one would have shorter exponents than the others."""
    kernels = [np.array(random_weights((256, 128), i)) for i in range(3)]
    kernels[1][:128] = 1
    return [{"kernel": kernel} for kernel in kernels]


def test_layers_one_by_one_have_arrays_of_equal_shapes(tmp_path):
    expected = df11_jax.compress_params(uneven_layers())
    save(tmp_path / "x", uneven_layers(), compress={})
    assert_same_tree(restore(tmp_path / "x"), expected)
    save_plain(tmp_path / "y", uneven_layers())
    assert_same_tree(restore(tmp_path / "y", compress={}), expected)


def test_compress_on_the_way_out(tmp_path):
    """`DF11Save` in the place of `StandardSave`, for bf16 parameters."""
    save(tmp_path / "x", plain_params(), compress=STACKED)
    assert_same_tree(restore(tmp_path / "x"), compressed_params())
    assert_same_tree(restore(tmp_path / "x", abstract(plain_params())), plain_params())


def test_compress_on_the_way_out_of_numpy(tmp_path):
    host = jax.tree.map(np.asarray, plain_params())
    save(tmp_path / "x", host, compress={})
    assert_same_weights(restore(tmp_path / "x"), host)
    assert isinstance(restore(tmp_path / "x")["layers"]["norm"], np.ndarray)


def test_saving_compresses_nothing_unasked(tmp_path):
    save(tmp_path / "x", plain_params())
    assert_same_tree(restore(tmp_path / "x"), plain_params())


def test_every_bit_pattern(tmp_path):
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    params = {"w": jnp.asarray(bits.view(jnp.bfloat16))}
    save(tmp_path / "x", {"w": df11_jax.compress(params["w"])})
    assert_same_bits(restore(tmp_path / "x", decompress=True)["w"], params["w"])
    save_plain(tmp_path / "y", params)
    again = restore(tmp_path / "y", {"w": df11_jax.compress(params["w"])})
    assert_same_bits(df11_jax.decompress(again["w"]), params["w"])


def test_plain_checkpoint_needs_to_be_named_so(plain):
    with pytest.raises(ValueError, match=r"no metadata of df11_jax .* pass compress=\{\}"):
        restore(plain)
    assert_same_tree(restore(plain, decompress=True), plain_params())
    assert_same_tree(restore(plain, abstract(plain_params())), plain_params())


def test_partial_restore(compressed, plain):
    small = compressed_params()
    part = {"layers": {"up": small["layers"]["up"]}, "embedding": small["embedding"]}
    assert_same_tree(restore(compressed, abstract(part), partial_restore=True), part)
    assert_same_tree(restore(plain, abstract(part), partial_restore=True), part)
    large = {"head": plain_params()["head"]}
    assert_same_tree(restore(compressed, abstract(large), partial_restore=True), large)


def test_placeholders(compressed, plain):
    """In the place of any leaf, which is not read; and of one that the checkpoint lacks."""
    small = compressed_params()
    target = {"new": ocp.PLACEHOLDER, **abstract(small)}
    target["embedding"] = target["head"]["bias"] = ocp.PLACEHOLDER

    def check(back):
        assert back.pop("new") is ocp.PLACEHOLDER
        assert back.pop("embedding") is ocp.PLACEHOLDER
        assert back["head"].pop("bias") is ocp.PLACEHOLDER
        head = {"kernel": small["head"]["kernel"]}
        assert_same_tree(back, {"layers": small["layers"], "head": head})

    check(restore(compressed, target))
    check(restore(plain, target))
    del target["layers"]
    with pytest.raises(ValueError, match="layers/norm: is not in the target\n  layers/up: is not"):
        restore(compressed, target)
    nothing = {"embedding": ocp.PLACEHOLDER}
    assert restore(compressed, nothing, partial_restore=True) == nothing


def test_placeholders_are_not_read(tmp_path):
    """Damage there goes unnoticed."""
    small = compressed_params()
    save(tmp_path / "x", small)
    flip_a_bit(tmp_path / "x", np.asarray(small["embedding"].sign_mantissa).tobytes())
    with pytest.raises(ValueError, match="checksums differ: embedding"):
        restore(tmp_path / "x", abstract(small))
    back = restore(tmp_path / "x", abstract(small) | {"embedding": ocp.PLACEHOLDER})
    assert back.pop("embedding") is ocp.PLACEHOLDER
    del small["embedding"]
    assert_same_tree(back, small)


def test_partial_restore_out_of_lists(tmp_path):
    tree = {"blocks": [compressed_params()["head"] for _ in range(3)], "x": (jnp.ones(1),)}
    save(tmp_path / "x", tree)
    last = {"blocks": {2: tree["blocks"][2]}}
    assert_same_tree(restore(tmp_path / "x", abstract(last), partial_restore=True), last)


@pytest.mark.slow
def test_what_is_not_asked_for_is_not_read(tmp_path):
    """Restoring one leaf does not need the memory that all would take."""
    program = """
import resource, sys, numpy as np, jax, jax.numpy as jnp, df11_jax
from orbax_helpers import restore, save
from payloads import random_weights

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

path = sys.argv[1]
if len(sys.argv) == 3:
    one = df11_jax.compress(random_weights((2048, 4096)))
    save(path, {f"w{i}": one for i in range(8)})
else:
    target = {"w3": jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16)}
    save(path + "-warm", {"w": df11_jax.compress(random_weights((256, 256)))})
    restore(path + "-warm", decompress=True)
    before = peak()
    restore(path, target, partial_restore=True)
    print((peak() - before) / (2 * 2048 * 4096))
"""
    run_python(program, tmp_path / "x", "save")
    # The leaf, compressed and not, and what Orbax and the decoder need to make it.
    assert float(run_python(program, tmp_path / "x")) < 3.5


@pytest.mark.slow
def test_memory_of_compressing_on_the_way_in(tmp_path):
    """Beside the result, the host holds what one leaf needs, and a cache of Orbax's."""
    program = """
import resource, sys, ml_dtypes, numpy as np, jax, jax.numpy as jnp, df11_jax
from orbax_helpers import restore, save_plain
from payloads import random_weights

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

path = sys.argv[1]
leaves, shape = 12, (4096, 4096)
if len(sys.argv) == 3:
    weights = random_weights(shape)
    save_plain(path, {f"w{i}": weights for i in range(leaves)})
else:
    save_plain(path + "-warm", {"w": random_weights((256, 256))})
    restore(path + "-warm", compress={})
    before = peak()
    small = restore(path, compress={})
    extra = peak() - before - df11_jax.size_report(small).nbytes
    print(extra / (2 * 4096 * 4096))
"""
    run_python(program, tmp_path / "x", "save")
    # Two leaves make a batch; of what it read before it decoded it, Orbax keeps 100 MB, or three
    # leaves. Reading all twelve at once takes more than 12.
    assert float(run_python(program, tmp_path / "x")) < 8


def test_disagreements(compressed, plain):
    small, large = abstract(compressed_params()), abstract(plain_params())
    shape = jax.ShapeDtypeStruct

    def check(path, target, *lines):
        with pytest.raises(ValueError) as caught:
            restore(path, target)
        first, *rest = str(caught.value).split("\n")
        assert first == f"{path}: the target disagrees with the checkpoint:"
        assert rest == [f"  {line}" for line in lines]

    check(
        compressed,
        large
        | {"embedding": shape((200, 129), jnp.bfloat16), "head": {"more": 1, **large["head"]}},
        "head/more: is not in the checkpoint",
    )
    check(
        compressed,
        {"embedding": large["embedding"], "layers": {"up": large["layers"]["up"]}},
        "head/bias: is not in the target",
        "head/kernel: is not in the target",
        "layers/norm: is not in the target",
    )
    check(
        compressed,
        large | {"embedding": shape((200, 129), jnp.bfloat16)},
        "embedding: the target has bfloat16[200,129], stored is bfloat16[200,128], compressed in "
        "slices of [200, 128]",
    )
    check(
        plain,
        large | {"embedding": shape((200, 128), jnp.float32)},
        "embedding: the target has float32[200,128], stored is bfloat16[200,128]",
    )
    up = small["layers"]["up"]
    unstacked = df11_jax.DF11Array.from_payload(
        (shape(a.shape[1:], a.dtype) for a in up.payload), make_layout(up.shape)
    )
    check(
        compressed,
        small | {"layers": {**small["layers"], "up": unstacked}},
        "layers/up: the target has bfloat16[3,128,192], compressed in slices of [3, 128, 192], "
        "stored is bfloat16[3,128,192], compressed in slices of [128, 192]",
    )
    # The static field, which Orbax alone ignores.
    wrong = dataclasses.replace(up, layout=make_layout((192, 128)))
    check(
        compressed,
        small | {"layers": {**small["layers"], "up": wrong}},
        "layers/up: the target has bfloat16[3,192,128], compressed in slices of [192, 128], "
        "stored is bfloat16[3,128,192], compressed in slices of [128, 192]",
    )


def test_many_disagreements(compressed):
    with pytest.raises(ValueError, match=r"is not in the checkpoint\n  and 25 more$"):
        restore(compressed, {str(i): jnp.ones(1) for i in range(30)})


def test_arguments_that_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        DF11Restore(compress={}, decompress=True)
    with pytest.raises(ValueError, match="needs a target"):
        DF11Restore(partial_restore=True)


def test_item_of_a_train_state(tmp_path):
    """A plain checkpoint of a training run, of which only the parameters are wanted."""
    state = {"step": jnp.asarray(3), "params": plain_params(), "mu": plain_params()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", state)
    small = restore(
        tmp_path / "x",
        {"params": abstract(plain_params())},
        compress={"stacked": "^params/layers/"},
        partial_restore=True,
    )
    assert_same_tree(small, {"params": compressed_params()})
