"""The machine that this process runs on."""

import platform


def processor_name() -> str:
    """The name that the processor gives itself; else that of its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
