"""The examination of a machine by `df11-jax doctor`."""

import platform
import warnings

import df11_jax
from df11_jax import _cuda, _ffi
from df11_jax.doctor.extras import GIVES, installed_version, required
from df11_jax.doctor.findings import Diagnosis, Finding
from df11_jax.doctor.machine import describe_cuda, environment, list_backends, local_devices
from df11_jax.doctor.self_test import Outcome, check_device, check_product, encode_samples


def examine() -> Diagnosis:
    """Looks at this machine: versions, backends, decoders, optional packages."""
    needed = required()
    versions = {"df11_jax": df11_jax.__version__, "python": platform.python_version()}
    diagnosis = Diagnosis(
        versions | {"jaxlib": installed_version("jaxlib")} | {p.name: p.installed for p in needed},
        f"{platform.system()} {platform.machine()}",
        environment(),
        describe_cuda(),
        extras={extra: packages for extra in GIVES if (packages := required(extra))},
    )
    for package in needed:
        if not package.will_do:
            diagnosis.problems.append(
                Finding(
                    f"df11_jax needs {package.requirement}, and "
                    f"{package.installed or 'none'} is installed",
                    f'pip install "{package.requirement}"',
                )
            )
    _examine_backends(diagnosis)
    _examine_driver(diagnosis)
    return diagnosis


def _examine_backends(diagnosis: Diagnosis) -> None:
    try:
        diagnosis.backends = list_backends()
    except RuntimeError as error:
        diagnosis.problems.append(
            Finding(
                f"JAX does not start: {str(error).strip()}",
                "Unset JAX_PLATFORMS, or set it to backends that are there",
            )
        )
        return
    for backend in diagnosis.backends:
        if backend.obstacle is not None:
            what = f"{backend.platform} decodes by {backend.decoder}, for {backend.why}"
            diagnosis.problems.append(Finding(what, backend.obstacle.remedy))
    samples, outcomes = encode_samples()
    diagnosis.self_tests += outcomes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it names this command
        for backend in diagnosis.backends:
            for device in local_devices(backend.platform):
                diagnosis.self_tests += check_device(device, backend.platform, samples)
                if backend.platform in _ffi.product_platforms():
                    diagnosis.self_tests.append(check_product(device, backend.platform))
    diagnosis.problems += map(_failure, filter(_has_failed, diagnosis.self_tests))


def _has_failed(test: Outcome) -> bool:
    return test.error is not None


def _failure(test: Outcome) -> Finding:
    return Finding(
        f"{test.decoder} on {test.device}, {test.layout} layout: {test.error}",
        "Do not use this decoder. If df11_jax, jax and the driver are as they were installed, "
        "please report this",
    )


def _examine_driver(diagnosis: Diagnosis) -> None:
    has_gpu = any(backend.platform == "cuda" for backend in diagnosis.backends)
    driver = _cuda.driver_version()
    if driver is None or has_gpu:
        return
    what = f"There is an NVIDIA driver for CUDA {_cuda.version_name(driver)}, but JAX has no GPU"
    if "JAX_PLATFORMS" in diagnosis.environment:
        remedy = "If that is not on purpose, unset JAX_PLATFORMS"
    elif diagnosis.cuda.jax_plugins:
        remedy = "What JAX wrote to the standard error says why it does not use the driver"
    else:
        remedy = f'If that is not on purpose: pip install "jax[cuda{driver[0]}]"'
    diagnosis.notes.append(Finding(what, remedy))
