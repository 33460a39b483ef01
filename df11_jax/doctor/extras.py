"""What is installed beside df11_jax, and what more there is to install."""

import dataclasses
import re
from collections.abc import Iterator
from importlib import metadata

# What the extras that a user may want give; the others are for work on df11_jax itself.
GIVES = {
    "cli": "the command line",
    "demo": "df11-jax demo",
    "flax": "df11_jax.linen and df11_jax.nnx, df11-jax fit",
    "models": "df11_jax.models, df11-jax generate and compare",
    "orbax": "df11_jax.orbax, and Orbax's folders in commands",
    "plot": "plots of reports",
    "bench": "df11-jax bench --plot",
    "train": "to train the demo's model again",
}

_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[(?P<extras>[\w,-]+)\])?\s*(?:>=\s*(?P<oldest>[\d.]+))?"
)


@dataclasses.dataclass(frozen=True)
class Package:
    """A distribution that is needed.

    Attributes:
        name: as pip calls it.
        oldest: version that will do; None for any.
        installed: version that is there; None for none.
    """

    name: str
    oldest: str | None
    installed: str | None

    @property
    def will_do(self) -> bool:
        """Whether it is there, and new enough."""
        if self.installed is None or self.oldest is None:
            return self.installed is not None
        return _release(self.installed) >= _release(self.oldest)

    def __str__(self) -> str:
        if self.installed is None:
            return self.name
        return f"{self.name} {self.installed}" + ("" if self.will_do else f" (< {self.oldest})")


def required(extra: str | None = None) -> list[Package]:
    """What df11_jax, or an extra of it, needs directly, according to its metadata.

    Args:
        extra: a name of an extra; None for what is always needed.

    Returns:
        The packages; none for an extra that this version does not have.
    """
    names = [] if extra is None else [extra]
    packages = {package.name: package for package in _required(names)}
    return sorted(packages.values(), key=lambda package: package.name)


def installed_version(name: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required(extras: list[str]) -> Iterator[Package]:
    of_an_extra = re.compile(r"""extra\s*==\s*['"]([\w-]+)['"]""")
    for line in metadata.requires("df11_jax") or []:
        requirement, _, marker = line.partition(";")
        condition = of_an_extra.search(marker)
        if (condition and condition[1] not in extras) or (extras and not condition):
            continue
        parsed = _REQUIREMENT.match(requirement.strip())
        assert parsed, line
        if parsed["extras"]:  # df11_jax[cli,flax]
            yield from _required(parsed["extras"].split(","))
        else:
            version = installed_version(parsed["name"])
            yield Package(parsed["name"], parsed["oldest"], version)


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version, without what marks a pre-release or a local build."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
