"""Compressed tensors where JAX wants an array."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from payloads import assert_same_bits, count_decodes, random_weights

from df11_jax import DF11Array, DF11Slice, compress, decompress, scan_blocks

WEIGHTS = random_weights((64, 128))
X = random_weights((3, 64), seed=1, scale=1.0)
ROW = random_weights((128,), seed=2, scale=1.0)

USES = {
    "asarray": lambda a, x: jnp.asarray(a),
    "left": lambda a, x: a @ ROW,
    "right": lambda a, x: x @ a,
    "numpy on the left": lambda a, x: np.ones((3, 64), np.float32) @ a,
    "numpy on the right": lambda a, x: a * np.ones(128, np.float32),
    "both": lambda a, x: a.T @ a,
    "dot": lambda a, x: jnp.dot(x, a),
    "dot of an array": lambda a, x: x.dot(a),
    "its own dot": lambda a, x: a.dot(ROW),
    "einsum": lambda a, x: jnp.einsum("bd,df->bf", x, a),
    "tensordot": lambda a, x: jnp.tensordot(x, a, 1),
    "take": lambda a, x: jnp.take(a, jnp.array([5, 0]), axis=0),
    "concatenate": lambda a, x: jnp.concatenate([a, a]),
    "gelu": lambda a, x: jax.nn.gelu(a),
    "T": lambda a, x: a.T,
    "mT": lambda a, x: a.mT,
    "all of it": lambda a, x: a[...],
    "astype": lambda a, x: a.astype(jnp.float32),
    "reshape": lambda a, x: a.reshape(-1, 4),
    "transpose": lambda a, x: a.transpose(1, 0),
    "swapaxes": lambda a, x: a.swapaxes(0, 1),
    "ravel": lambda a, x: a.ravel(),
    "sum": lambda a, x: a.sum(axis=0),
    "mean": lambda a, x: a.mean(),
    "negative": lambda a, x: -a,
    "positive": lambda a, x: +a,
    "abs": lambda a, x: abs(a),
}
for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
):
    _operator = getattr(operator, _name)
    USES[_name] = lambda a, x, f=_operator: f(a, 3)
    USES[f"r{_name}"] = lambda a, x, f=_operator: f(2.5, a)
    USES[f"{_name} of an array"] = lambda a, x, f=_operator: f(a, ROW)
    USES[f"r{_name} of an array"] = lambda a, x, f=_operator: f(ROW, a)
    USES[f"{_name} of numpy's"] = lambda a, x, f=_operator: f(a, np.float32(2))
    USES[f"r{_name} of numpy's"] = lambda a, x, f=_operator: f(np.ones(128, np.float32), a)
USES["pow"] = lambda a, x: a**2
USES["rpow"] = lambda a, x: 2**a


@pytest.fixture(scope="module")
def small():
    return compress(WEIGHTS)


@pytest.fixture(scope="module")
def stack():
    return compress(random_weights((2, 64, 64)), stack_axes=1)


def assert_same(result, expected):
    """The same bits, of any dtype."""
    assert result.dtype == expected.dtype
    bits = bool if expected.dtype == bool else f"u{expected.dtype.itemsize}"
    np.testing.assert_array_equal(np.asarray(result).view(bits), np.asarray(expected).view(bits))


@pytest.mark.parametrize("name", USES)
def test_gives_what_the_tensor_gives(name, small):
    use = USES[name]
    for transform in (lambda f: f, jax.jit):
        assert_same(transform(use)(small, X), transform(use)(jnp.asarray(WEIGHTS), X))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts decodes of the CPU handler")
def test_is_decoded_where_it_is_used(small):
    assert count_decodes(jax.jit(lambda a, x: x @ a), small, X) == 1
    assert count_decodes(jax.jit(lambda a, x: (a.shape, a.dtype, x)[-1]), small, X) == 0


@pytest.mark.parametrize(
    "name", ["left", "right", "numpy on the left", "einsum", "T", "all of it", "astype"]
)
def test_a_slice_gives_what_its_tensor_gives(name):
    weights = jnp.stack([WEIGHTS, WEIGHTS[::-1]])
    stack, use = compress(weights, stack_axes=1), USES[name]

    def each(x, a, _):
        assert (a.shape, a.ndim, a.dtype) == ((64, 128), 2, jnp.bfloat16)
        return x, use(a, x)

    def run(stack):
        return scan_blocks(each, X, stack, lazy=True)[1]

    for transform in (lambda f: f, jax.jit):
        assert_same(transform(run)(stack), transform(run)(weights))


def test_several_slices_give_what_their_tensors_give(stack):
    index = jnp.array([1, 0, 1])
    assert_same_bits(DF11Slice(stack, index) + 1, decompress(stack)[index] + 1)


def test_under_transformations(small, stack):
    weights = jnp.asarray(WEIGHTS)
    gradient = jax.grad(lambda x, w: (x @ w).astype(jnp.float32).sum())
    assert_same_bits(gradient(X, small), gradient(X, weights))
    _, out = lax.scan(lambda carry, a: (carry, a + 0), None, stack)
    mapped = jax.vmap(lambda a: a + 0)(stack)
    for i in range(2):
        assert_same_bits(out[i], jnp.asarray(stack[i]))
        assert_same_bits(mapped[i], jnp.asarray(stack[i]))


@pytest.mark.parametrize("use", [lambda a, x: lax.dot(x, a), lambda a, x: lax.exp(a)])
def test_primitives_refuse_it(use, small):
    with pytest.raises((TypeError, ValueError)):
        use(small, X)
    use(jnp.asarray(small), X)


@pytest.mark.parametrize(
    "use",
    [
        jnp.asarray,
        lambda a: X @ a,
        lambda a: a.T,
        lambda a: a + 1,
        lambda a: a == 0,
        jnp.sum,
        lambda a: jnp.dot(X, a),
    ],
)
def test_a_stack_is_refused(use, stack):
    message = r"\[2,64,64\].*scan_blocks\(.*a\[i\].*decompress\(a\)"
    for f in (use, jax.jit(use)):
        with pytest.raises(TypeError, match=message):
            f(stack)


@pytest.mark.parametrize("use", [np.asarray, np.array, lambda a: jnp.save("nowhere", a)])
def test_numpy_is_refused(use, small, stack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for a in (small, stack, DF11Slice(stack, 1)):
        with pytest.raises(TypeError, match=r"bfloat16\[.*np.asarray\(df11_jax.decompress\(a\)\)"):
            use(a)


def test_assignment_is_refused(small, stack):
    for a in (small, stack):
        with pytest.raises(TypeError, match=r"bfloat16\[.*constants.*\.at\[index\]\.set\(value\)"):
            a[0] = 1


def test_stays_an_object_with_an_identity(small):
    assert small == small and small != compress(WEIGHTS)
    assert small != None and small != "a"  # noqa: E711
    assert len({small, small}) == 1
    assert isinstance(jax.device_put(small), DF11Array)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only CPUs raise errors")
@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x + x, jnp.zeros_like])
def test_arithmetic_on_the_arrays_inside_does_not_go_unnoticed(change, small):
    # Which of the two depends on whether the call had to wait.
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="DATA_LOSS"):
        jax.block_until_ready(jnp.asarray(jax.tree.map(change, small)))


@pytest.mark.parametrize("change", [lambda x: x.astype(jnp.float32), lambda x: 0.5 * x])
def test_arrays_inside_that_become_floats(change, small):
    with pytest.raises(ValueError, match=r"header is float32\[28\], expected uint32\[28\]"):
        jnp.asarray(jax.tree.map(change, small))


def test_gradients_with_respect_to_it_are_refused(small):
    with pytest.raises(TypeError, match="uint32"):
        jax.grad(lambda a: (X @ a).astype(jnp.float32).sum())(small)


def test_truth_is_that_of_the_array(small):
    assert not compress(jnp.zeros((), jnp.bfloat16)) and compress(jnp.ones((), jnp.bfloat16))
    with pytest.raises(ValueError, match="truth value of an array with more than one element"):
        bool(small)
