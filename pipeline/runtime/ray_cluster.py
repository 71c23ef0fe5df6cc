"""Starting Ray on this machine, or joining a cluster that runs already."""

import os
import time

from clipmill.base.errors import UserError

JOIN_ATTEMPTS = 4


def start_ray(settings) -> bool:
    """Join the cluster that the settings or the environment name, else start Ray here. True if this call did either.

    settings: `EngineSettings`. Raises UserError if no cluster answers at the address.
    """
    import ray

    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    quiet = {"logging_level": "ERROR", "log_to_driver": False, "ignore_reinit_error": True}
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if not address:
        ray.init(num_cpus=settings.cpus, include_dashboard=False, **quiet)
        return True
    for attempt in range(1, JOIN_ATTEMPTS + 1):  # the first node asked may just have died
        try:
            ray.init(address=address, **quiet)
            return True
        except ConnectionError as error:
            if attempt == JOIN_ATTEMPTS:
                raise UserError(
                    f"engine.address or RAY_ADDRESS: the Ray cluster at {address} cannot be joined ({error})."
                ) from error
            time.sleep(3)
    raise AssertionError("unreachable")
