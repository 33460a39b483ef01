"""The processes of a command that runs on several hosts, or once for each GPU of a host."""

import os
import sys
from collections.abc import Callable
from typing import Any

import click

# Seconds without a sign of life after which a process counts as dead; and those that one which has
# failed waits for the others, which it then ends.
_TIMEOUT = 30

# How many processes a launcher has started; a job of Kubernetes asks its API.
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
POD = "JOB_COMPLETION_INDEX"


def processes_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--coordinator`, `--process-id` and `--num-processes`."""
    coordinator = click.option(
        "--coordinator",
        metavar="HOST:PORT",
        help="Address of process 0, of several that run this command together. Under Slurm, Open "
        "MPI and Kubernetes, JAX finds this and the next two.",
    )
    process_id = click.option("--process-id", type=click.IntRange(0), help="Which process this is.")
    count = click.option(
        "--num-processes",
        type=click.IntRange(1),
        help="Number of processes; 1 to run alone, whatever started this.",
    )
    return coordinator(process_id(count(command)))


def join_processes(
    coordinator: str | None, process_id: int | None, num_processes: int | None
) -> bool:
    """Joins the other processes, if there are some, before JAX is used.

    Returns:
        Whether this process is the one that prints. The others have no standard output any more.

    Raises:
        click.UsageError: some of the options are missing, or the address has no port.
        RuntimeError: the other processes are not found.
    """
    if num_processes == 1:
        return True
    given = [option is not None for option in (coordinator, process_id, num_processes)]
    if any(given) and not all(given):
        raise click.UsageError(
            "--coordinator, --process-id and --num-processes belong together: give all three"
        )
    if not any(given) and not is_launched():
        return True
    if coordinator is not None:
        port = coordinator.rpartition(":")[2]
        if not (port.isdecimal() and 0 < int(port) < 2**16):  # JAX may look for it for minutes
            raise click.UsageError(
                f"--coordinator {coordinator}: expected HOST:PORT, PORT up to 65535"
            )
    import jax

    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_TIMEOUT,
            shutdown_timeout_seconds=_TIMEOUT,
        )
    except Exception as error:  # of JAX, or of the client of Kubernetes
        raise RuntimeError(
            f"JAX could not join the other processes ({error}). Give --coordinator HOST:PORT, "
            "--process-id and --num-processes; or --num-processes 1 to run alone"
        ) from None
    if jax.process_index() == 0:
        return True
    sys.stdout = open(os.devnull, "w")
    return False


def is_launched() -> bool:
    """Whether a launcher has started several processes, by what it puts into the environment."""
    return POD in os.environ or any(os.environ.get(name, "1") != "1" for name in COUNTS)
