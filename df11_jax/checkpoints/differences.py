"""Verification of checkpoints, whatever their formats: of one, and bit by bit against another."""

from collections.abc import Iterator

from df11_jax._bits import first_difference
from df11_jax._files.model_config import ModelConfig
from df11_jax._files.source import Source, unchanged
from df11_jax._host_arrays import as_bytes
from df11_jax._progress import ProgressBar


def differences(a: Source, b: Source, *, progress: bool = False) -> Iterator[str]:
    """Compares all tensors of two checkpoints bit by bit, holding one of each at a time.

    It first yields all names, shapes and dtypes that differ. If there are none, it compares bits,
    and yields the first tensor that differs. It is no difference if one checkpoint lacks
    `lm_head.weight`, its config.json ties that to the embedding, and the other checkpoint's
    `lm_head.weight` is the same as the embedding, bit for bit.

    Args:
        a: one checkpoint.
        b: the other checkpoint.
        progress: whether to show a progress bar.

    Yields:
        Descriptions of the differences.

    Raises:
        ValueError: a tensor is corrupt, or a file was changed while it was read.
    """
    pairs, different = _pair_up(a, b)
    for name_a, name_b in pairs:
        in_a, in_b = a.tensors[name_a], b.tensors[name_b]
        if (in_a.dtype, in_a.shape) != (in_b.dtype, in_b.shape):
            different.append(
                f"{name_a} is {in_a.dtype}{list(in_a.shape)} in {a.path}, "
                f"{in_b.dtype}{list(in_b.shape)} in {b.path}"
            )
    yield from different
    if different:
        return
    total = sum(a.tensors[name].nbytes for name, _ in pairs)
    with unchanged(a), unchanged(b), ProgressBar("verify", total, show=progress) as bar:
        for name_a, name_b in pairs:
            difference = first_difference(a.read(name_a), b.read(name_b))
            if difference:
                as_in_b = "" if name_a == name_b else f" ({name_b} in {b.path})"
                yield f"{name_a}{as_in_b}{difference}"
                return
            bar.update(name_a, a.tensors[name_a].nbytes)


def read_all(source: Source, *, progress: bool = False) -> None:
    """Reads all tensors of a checkpoint, one at a time, which verifies the checksums that it has.

    Args:
        source: the checkpoint.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a tensor is corrupt, or a file was changed while it was read.
    """
    total = sum(info.nbytes for info in source.tensors.values())
    with unchanged(source), ProgressBar("verify", total, show=progress) as bar:
        for name, info in source.tensors.items():
            as_bytes(source.read(name)).max(initial=0)  # a view would not be read
            bar.update(name, info.nbytes)


def _pair_up(a: Source, b: Source) -> tuple[list[tuple[str, str]], list[str]]:
    """Pairs of names, in `a` and `b`, of tensors to compare, and what has no counterpart."""
    # Published checkpoints are decoded unit by unit, so they are best read in their own order.
    names = b.tensors if b.format == "published" else a.tensors
    pairs = [(name, name) for name in names if name in a.tensors and name in b.tensors]
    alone = []
    for here, there in ((a, b), (b, a)):
        for name in here.tensors:
            if name in there.tensors:
                continue
            tied = _tied_embedding(name, there)
            if tied is None:
                alone.append(f"{name} is in {here.path} only")
            else:
                pairs.append((name, tied) if here is a else (tied, name))
    return pairs, alone


def _tied_embedding(name: str, source: Source) -> str | None:
    """The embedding that stands for an `lm_head` if a checkpoint rightly lacks that."""
    if name.rpartition("lm_head.weight")[1:] != ("lm_head.weight", ""):
        return None
    if not ModelConfig(source.model_config()).is_tied:
        return None
    return next((other for other in source.tensors if other.endswith("embed_tokens.weight")), None)
