from typing import Any

cuda_version: int
architectures: list[int]

def handlers() -> dict[str, Any]: ...
