"""The weight matrices of transformer blocks, from the public configurations of models."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Block:
    """The shapes of a model's transformer block.

    Attributes:
        layers: the number of such blocks that the model has.
        hidden: the width of the residual stream.
        query: the number of query heads times their width.
        key_value: the number of key (or value) heads times their width.
        mlp: the width of the feed-forward layer.
    """

    layers: int
    hidden: int
    query: int
    key_value: int
    mlp: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The seven matrices, [in, out] like Flax kernels."""
        return {
            "query": (self.hidden, self.query),
            "key": (self.hidden, self.key_value),
            "value": (self.hidden, self.key_value),
            "out": (self.query, self.hidden),
            "gate": (self.hidden, self.mlp),
            "up": (self.hidden, self.mlp),
            "down": (self.mlp, self.hidden),
        }

    @property
    def products(self) -> dict[str, dict[str, tuple[int, int]]]:
        """The matrices of each of the four products, those of one product side by side."""
        merged = {
            "qkv": ("query", "key", "value"),
            "out": ("out",),
            "gate_up": ("gate", "up"),
            "down": ("down",),
        }
        shapes = self.matrices
        return {name: {part: shapes[part] for part in parts} for name, parts in merged.items()}

    @property
    def size(self) -> int:
        """The number of weights of one block."""
        return sum(rows * cols for rows, cols in self.matrices.values())

    def divided(self, divisor: int) -> "Block":
        """A block whose matrices are these with all sides divided."""
        sides = dataclasses.astuple(self)[1:]
        return Block(self.layers, *(side // divisor for side in sides))


BLOCKS = {
    "Llama-3.1-8B": Block(layers=32, hidden=4096, query=32 * 128, key_value=8 * 128, mlp=14336),
    "Llama-3.1-70B": Block(layers=80, hidden=8192, query=64 * 128, key_value=8 * 128, mlp=28672),
    "Qwen3-14B": Block(layers=40, hidden=5120, query=40 * 128, key_value=8 * 128, mlp=17408),
    "Gemma-3-27B": Block(layers=62, hidden=5376, query=32 * 128, key_value=16 * 128, mlp=21504),
}


def fitting_block(model: str, max_weights: int, blocks: int = 1) -> tuple[str, Block]:
    """A model's block, its sides halved until so many blocks have no more than `max_weights`.

    Args:
        model: a name in `BLOCKS`.
        max_weights: the most weights.
        blocks: the number of blocks that have no more weights together.

    Returns:
        The name of the model, with the divisor if there is one, and the block.
    """
    block, divisor = BLOCKS[model], 1
    while blocks * block.divided(divisor).size > max_weights:
        divisor *= 2
    return (f"{model} / {divisor}" if divisor > 1 else model), block.divided(divisor)
