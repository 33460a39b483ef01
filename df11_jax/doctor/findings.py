"""What `df11-jax doctor` found."""

import dataclasses
from typing import Any

from df11_jax.doctor.extras import GIVES, Package
from df11_jax.doctor.machine import Backend, Cuda
from df11_jax.doctor.self_test import Outcome


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know or to do.

    Attributes:
        what: the thing that was found, in a sentence.
        remedy: the thing to do about it, in a sentence.
    """

    what: str
    remedy: str


@dataclasses.dataclass
class Diagnosis:
    """All that was found.

    Attributes:
        versions: the versions of Python, of df11_jax and of the packages that it always needs.
        system: the operating system and the architecture.
        environment: the variables that say which devices JAX may use.
        backends: the backends of JAX.
        cuda: the CUDA library and the driver.
        self_tests: the outcome of each self-test.
        extras: the packages that each extra of df11_jax needs.
        problems: the findings that do not work although they should.
        notes: all other findings.
    """

    versions: dict[str, str | None]
    system: str
    environment: dict[str, str]
    cuda: Cuda
    backends: list[Backend] = dataclasses.field(default_factory=list)
    self_tests: list[Outcome] = dataclasses.field(default_factory=list)
    extras: dict[str, list[Package]] = dataclasses.field(default_factory=dict)
    problems: list[Finding] = dataclasses.field(default_factory=list)
    notes: list[Finding] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All that was found, in types that JSON knows."""
        found: dict[str, Any] = dataclasses.asdict(self)
        for backend, described in zip(self.backends, found["backends"], strict=True):
            described["obstacle"] = backend.obstacle and backend.obstacle._asdict()
        found["extras"] = {
            extra: {
                "gives": GIVES[extra],
                "packages": {package.name: package.installed for package in packages},
                "will_do": all(package.will_do for package in packages),
            }
            for extra, packages in self.extras.items()
        }
        return {"ok": not self.problems} | found
