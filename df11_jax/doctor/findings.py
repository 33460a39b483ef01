"""What `df11-jax doctor` found: as JSON, and as tables."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from df11_jax.doctor.extras import GIVES, Package
from df11_jax.doctor.machine import Backend, Cuda
from df11_jax.doctor.self_test import Outcome


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know or to do.

    Attributes:
        what: was found.
        remedy: what to do about it.
    """

    what: str
    remedy: str


@dataclasses.dataclass
class Report:
    """All that was found; what does not work although it should is in `problems`.

    Attributes:
        versions: of Python, of df11_jax and of what it always needs.
        system: operating system and architecture.
        environment: variables that say which devices JAX may use.
        backends: of JAX.
        cuda: library and driver.
        self_tests: how they went.
        extras: what each extra of df11_jax needs.
        problems: make the command end with status 1.
        notes: do not.
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
        """All of it, in types that JSON knows."""
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

    def print(self, console: Console) -> None:
        """Prints it."""
        versions = (f"{name} {version or 'missing'}" for name, version in self.versions.items())
        console.print(", ".join(versions))
        console.print(f"on {self.system}")
        for name, value in self.environment.items():
            console.print(f"{name}={value}")
        console.print(self._backend_table())
        console.print(self._cuda_table())
        console.print(self._self_test_table())
        console.print(self._extra_table())
        for title, findings in (("To know", self.notes), ("Does not work", self.problems)):
            for finding in findings:
                console.print(Text(f"\n{title}: {finding.what}"), soft_wrap=True)
                console.print(Text(f"  What to do: {finding.remedy}"), soft_wrap=True)
        if not self.problems:
            console.print("\nAll that should work here works.")

    def _backend_table(self) -> Table:
        table = _table("Backends of JAX", "backend", "devices", "decoder", "because")
        for backend in self.backends:
            kinds = (
                f"{backend.devices.count(kind)} x {kind}" for kind in dict.fromkeys(backend.devices)
            )
            default = " (default)" if backend.is_default else ""
            cells = (backend.platform + default, "\n".join(kinds), backend.decoder, backend.why)
            table.add_row(*map(Text, cells))
        return table

    def _cuda_table(self) -> Table:
        cuda = self.cuda
        table = _table("CUDA", "", "")
        rows = {"library in this build": "yes" if cuda.in_build else "no"}
        if cuda.in_build:
            rows["loads"] = "yes" if cuda.loads else f"no: {cuda.error}"
        if cuda.loads:
            rows["built for"] = f"CUDA {cuda.built_for}, compute capability " + ", ".join(
                cuda.compute_capabilities
            )
            rows["needs"] = str(cuda.needs)
        rows["driver here"] = "none"
        if cuda.driver_cuda:
            rows["driver here"] = f"{cuda.driver or 'unknown'}, for CUDA {cuda.driver_cuda}"
        plugins = (f"{name} {version}" for name, version in cuda.jax_plugins.items())
        rows["packages of JAX for it"] = ", ".join(plugins) or "none"
        for name, value in rows.items():
            table.add_row(name, Text(value))
        return table

    def _self_test_table(self) -> Table:
        table = _table("Self-test, bit by bit", "device", "decoder", "layout", "weights", "")
        for test in self.self_tests:
            device = test.platform if test.platform == test.device else test.device
            verdict = test.error or f"same bits, {test.seconds:.1f} s"
            cells = (device, test.decoder, test.layout, f"{test.weights:,}", verdict)
            table.add_row(*map(Text, cells))
        return table

    def _extra_table(self) -> Table:
        table = _table("Optional", "for", "installed", "missing", "to install")
        for extra, packages in self.extras.items():
            there = [package for package in packages if package.will_do]
            missing = [package for package in packages if not package.will_do]
            table.add_row(
                GIVES[extra],
                Text(", ".join(map(str, there))),
                Text(", ".join(map(str, missing))),
                Text(f'pip install "df11_jax[{extra}]"' if missing else ""),
            )
        return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
