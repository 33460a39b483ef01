"""The packages that df11_jax and its extras need, and those that are installed."""

import dataclasses
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# The use of each extra that a user may want; the others are for work on df11_jax itself.
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


@dataclasses.dataclass(frozen=True)
class Package:
    """A distribution that is needed.

    Attributes:
        requirement: its name, and the versions that will do.
        installed: the version that is there; None for none.
    """

    requirement: Requirement
    installed: str | None

    @property
    def name(self) -> str:
        """The name that pip knows."""
        return self.requirement.name

    @property
    def will_do(self) -> bool:
        """Whether it is there, in a version that will do."""
        versions = self.requirement.specifier
        return self.installed is not None and versions.contains(self.installed, prereleases=True)

    def __str__(self) -> str:
        if self.installed is None:
            return self.name
        needed = "" if self.will_do else f" (needs {self.requirement.specifier})"
        return f"{self.name} {self.installed}{needed}"


def required(extra: str | None = None) -> list[Package]:
    """The packages that df11_jax, or an extra of it, needs directly, according to its metadata.

    Args:
        extra: the name of an extra; None for the packages that are always needed.

    Returns:
        The packages, sorted by name; none for an extra that this version does not have.
    """
    packages = {package.name: package for package in _required(extra or "", set())}
    return [packages[name] for name in sorted(packages)]


def installed_version(name: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required(extra: str, seen: set[str]) -> Iterator[Package]:
    seen.add(extra)
    for line in metadata.requires("df11_jax") or []:
        requirement = Requirement(line)
        if not _applies(requirement, extra) or (extra and _applies(requirement, "")):
            continue
        if canonicalize_name(requirement.name) == "df11-jax":  # df11_jax[cli,flax]
            for other in requirement.extras - seen:
                yield from _required(other, seen)
        else:
            yield Package(requirement, installed_version(requirement.name))


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
