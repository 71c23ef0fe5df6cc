"""The same training under Ray Train: as many processes as asked for, on this machine or on a cluster.

Ray places the processes, joins them, and starts them again when one dies; each of them calls `training.trainer.train`,
which goes on from the run's last checkpoint. The run folder and the corpus must be where every node sees them.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipmill.base.errors import UserError
from clipmill.base.ray_cluster import ray_cluster
from training.data.loader import LoaderError
from training.run.folder import RunFolder
from training.run.setup import Request, requested_settings
from training.trainer import Report, train

MAX_RESTARTS = 3  # after workers or nodes have died; a run that kills its workers must end some time


def train_on_ray(request: Request, num_workers: int, address: str | None = None) -> Report:
    """Raises UserError for the user's mistakes, and where workers died more often than `MAX_RESTARTS`.

    address  of a cluster, as for builds; None: the surrounding one or RAY_ADDRESS, else Ray starts on this machine
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    device = requested_settings(request).train.device
    RunFolder(request.run).create()  # before Ray writes there: a folder with only Ray's files would be taken for no run
    cpus = max(num_workers + 1, os.cpu_count() or 1)  # as many workers as asked for, whatever this machine has
    with ray_cluster(address, cpus, setting="--address", show_output=True):
        use_gpu = device != "cpu" and ray.cluster_resources().get("GPU", 0) >= num_workers
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"request": asdict(request)},
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=RunConfig(
                name="ray", storage_path=str(Path(request.run).absolute()), failure_config=FailureConfig(MAX_RESTARTS)
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise UserError(f"training on Ray has failed: {_last_line(error)}") from error
    outcome = result.return_value
    if "mistake" in outcome:
        raise UserError(outcome["mistake"])
    return Report(Path(outcome["run"]), outcome["step"], outcome["total_steps"], outcome["reason"])


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """One training process: its report as plain values, or the mistake that all of them have met."""
    import ray.train

    os.environ["LOCAL_WORLD_SIZE"] = str(ray.train.get_context().get_local_world_size())
    request = dict(config["request"])
    request |= {name: tuple(map(_tuple, request[name])) for name in ("assignments", "tables")}
    try:
        report = train(Request(**request))
        return asdict(report) | {"run": str(report.run)}
    except LoaderError:
        raise  # Ray ends the others, which wait for this one
    except UserError as error:
        return {"mistake": str(error)}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
