"""How large are Orbax checkpoints of compressed weights, and how fast, beside Orbax's own?

    pip install ".[benchmark]"
    python benchmarks/orbax_checkpoints.py compare demo
    python benchmarks/orbax_checkpoints.py compare normal
    python benchmarks/orbax_checkpoints.py settings

Each prints what it measured; nothing is asserted here but bits. Files are written to, and read
from, a temporary folder, most likely from the page cache: what is compared is the work, not the
disk. (This file is not called orbax.py, because it then could not import Orbax.)
"""

import contextlib
import itertools
import pathlib
import shutil
import tempfile
import time

import click

MEGA = 2**20
LEAVES = 16
LEAF_SHAPE = (8, 2048, 2048)  # 64 MiB


@click.group()
def commands() -> None:
    """Measures checkpoints."""


@commands.command()
@click.argument("data", type=click.Choice(["demo", "normal"]))
@click.option("--repeats", default=5, show_default=True)
@click.option("--folder", type=click.Path(path_type=pathlib.Path), help="Where to write.")
def compare(data: str, repeats: int, folder: pathlib.Path | None) -> None:
    """Size, and times to save and to restore, of the demo's model or 1 GB of normal weights."""
    import jax
    import orbax.checkpoint as ocp

    import df11_jax
    from df11_jax.orbax import DF11CheckpointHandler, DF11Restore, DF11Save

    small = _demo() if data == "demo" else _normal()
    plain = jax.block_until_ready(df11_jax.decompress_params(small))
    nbytes = df11_jax.size_report(small).nbytes_before
    stacked = {"stacked": "^layers/"}
    default, ours = ocp.PyTreeCheckpointHandler, DF11CheckpointHandler
    restore_plain = ocp.args.PyTreeRestore(
        plain, restore_args=ocp.checkpoint_utils.construct_restore_args(plain)
    )
    checkpointers = {
        "Orbax's default, bf16": (default(), ocp.args.PyTreeSave(plain), restore_plain),
        "Orbax uncompressed, bf16": (
            default(use_compression=False),
            ocp.args.PyTreeSave(plain),
            restore_plain,
        ),
        "df11": (ours(), DF11Save(small), DF11Restore()),
        "df11, not verified": (ours(), DF11Save(small), DF11Restore(verify=False)),
        "df11 from and to bf16": (
            ours(),
            DF11Save(plain, compress=stacked),
            DF11Restore(decompress=True),
        ),
    }
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in checkpointers}
    sizes = {}
    with _temporary(folder) as path:
        # Interleaved, so that whatever else the machine does meets all alike.
        for _ in range(repeats + 1):
            for name, (handler, save, restore) in checkpointers.items():
                shutil.rmtree(path / "x", ignore_errors=True)
                with ocp.AsyncCheckpointer(handler) as checkpointer:
                    start = time.perf_counter()
                    checkpointer.save(path / "x", args=save)
                    blocked = time.perf_counter() - start
                    checkpointer.wait_until_finished()
                    saved = time.perf_counter() - start
                    start = time.perf_counter()
                    restored = jax.block_until_ready(checkpointer.restore(path / "x", args=restore))
                    times[name].append((saved, blocked, time.perf_counter() - start))
                if name not in sizes:
                    sizes[name] = _size(path / "x")
                    _assert_same(restored, plain)
                del restored
    planes = list(_byte_planes(plain))
    sizes["byte planes under zstd 1"] = sum(_zstd(plane, 1) for plane in planes)
    # Too slow for more than a part.
    part = [plane[: 16 * MEGA] for plane in planes[:2]] if data == "normal" else planes
    share = sum(_zstd(plane, 19) for plane in part) / sum(map(len, part))
    sizes["byte planes under zstd 19"] = round(share * nbytes)
    print(f"{data}: {nbytes / MEGA:.1f} MiB of bf16, best of {repeats}")
    print(f"{'':28}{'size':>8}{'save':>9}{'of it blocking':>16}{'restore':>9}   seconds")
    first = None
    for name, size in sizes.items():
        line = f"{name:28}{100 * size / nbytes:7.2f}%"
        if name in times:
            best = [min(column) for column in zip(*times[name][1:], strict=True)]
            first = first or best
            line += f"{best[0]:9.3f}{best[1]:16.3f}{best[2]:9.3f}"
            line += f"   times Orbax's default: save {first[0] / best[0]:.2f},"
            line += f" restore {first[2] / best[2]:.2f} as fast"
        print(line)


@commands.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--folder", type=click.Path(path_type=pathlib.Path), help="Where to write.")
def settings(repeats: int, folder: pathlib.Path | None) -> None:
    """The choices that Orbax has for storing compressed weights: 512 MiB of normal weights."""
    import jax
    import orbax.checkpoint as ocp

    import df11_jax

    small = _normal(LEAVES // 2)
    nbytes = df11_jax.size_report(small).nbytes_before
    args = ocp.checkpoint_utils.construct_restore_args(small)
    restore = ocp.args.PyTreeRestore(small, restore_args=args)
    choices = list(itertools.product((True, False), (True, False), (True, False)))
    times: dict[tuple[bool, ...], list[tuple[float, float]]] = {choice: [] for choice in choices}
    sizes = {}
    with _temporary(folder) as path:
        for _, choice in itertools.product(range(repeats + 1), choices):
            shutil.rmtree(path / "x", ignore_errors=True)
            zarr3, ocdbt, compression = choice
            handler = ocp.PyTreeCheckpointHandler(
                use_zarr3=zarr3, use_ocdbt=ocdbt, use_compression=compression
            )
            with ocp.Checkpointer(handler) as checkpointer:
                start = time.perf_counter()
                checkpointer.save(path / "x", args=ocp.args.PyTreeSave(small))
                middle = time.perf_counter()
                jax.block_until_ready(checkpointer.restore(path / "x", args=restore))
                times[choice].append((middle - start, time.perf_counter() - middle))
            files = [file for file in (path / "x").rglob("*") if file.is_file()]
            sizes[choice] = _size(path / "x"), len(files)
    for choice in choices:
        zarr3, ocdbt, compression = choice
        save, load = (min(column) for column in zip(*times[choice][1:], strict=True))
        size, files = sizes[choice]
        print(
            f"zarr {3 if zarr3 else 2}, {'OCDBT' if ocdbt else 'files'}, "
            f"{'zstd' if compression else 'raw '}: {100 * size / nbytes:.2f}% in {files:3} files, "
            f"save {save:.3f} s, restore {load:.3f} s"
        )


@contextlib.contextmanager
def _temporary(folder: pathlib.Path | None):
    with tempfile.TemporaryDirectory(dir=folder) as path:
        yield pathlib.Path(path)


def _demo():
    from df11_jax.demo.checkpoint import load_checkpoint

    return load_checkpoint()


def _normal(leaves: int = LEAVES):
    import jax
    import ml_dtypes
    import numpy as np

    import df11_jax

    rng = np.random.default_rng(0)
    params = {}
    for i in range(leaves):
        weights = rng.standard_normal(LEAF_SHAPE, np.float32) * np.float32(0.02)
        params[f"{i}"] = df11_jax.compress(
            weights.astype(ml_dtypes.bfloat16), stack_axes=1, verify=False
        )
    return jax.block_until_ready({"layers": params})


def _byte_planes(params):
    """The low and the high bytes of each leaf, one after the other."""
    import jax
    import numpy as np

    for leaf in jax.tree.leaves(params):
        for i in range(2):
            yield np.asarray(leaf).reshape(-1).view(np.uint8)[i::2].tobytes()


def _zstd(data: bytes, level: int) -> int:
    import zstandard

    return len(zstandard.ZstdCompressor(level=level).compress(data))


def _size(path: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _assert_same(restored, plain) -> None:
    import jax
    import numpy as np

    import df11_jax

    restored = df11_jax.decompress_params(restored)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(plain), strict=True):
        assert np.array_equal(np.asarray(a).view(np.uint16), np.asarray(b).view(np.uint16))


if __name__ == "__main__":
    commands()
