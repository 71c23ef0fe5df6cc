"""Train under Ray Train, with any number of processes, on this machine or on a cluster.

Ray places the processes, joins them, and restarts them when one dies; each calls `training.trainer.train`, which
resumes from the run's last checkpoint. Every node must see the run folder and the corpus under the same path.
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


def train_on_ray(request: Request, num_workers: int, address: str | None = None) -> Report:
    """Train a run with `num_workers` processes. Raises UserError, also after `train.max_restarts` restarts.

    address  address of a Ray cluster; None: the surrounding one or RAY_ADDRESS, else Ray starts on this machine
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = RunFolder(request.run)
    settings = requested_settings(request, folder).train
    folder.create()  # before Ray writes there, because a folder with only Ray's files is refused as not a run
    cpus = max(num_workers + 1, os.cpu_count() or 1)  # allows more workers than this machine has cores
    with ray_cluster(address, cpus, setting="--address", allow_open=settings.allow_open_cluster, show_output=True):
        use_gpu = settings.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= num_workers
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"request": asdict(request)},
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            run_config=RunConfig(
                name="ray",
                storage_path=str(Path(request.run).absolute()),
                failure_config=FailureConfig(max_failures=settings.max_restarts),
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(f"training on Ray failed: {lines[-1]}") from error
    outcome = result.return_value
    if "mistake" in outcome:
        raise UserError(outcome["mistake"])
    return Report(Path(outcome["run"]), outcome["step"], outcome["total_steps"], outcome["reason"])


def _worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run one training process; return its report as plain values, or the user's mistake that all processes report."""
    import ray.train

    os.environ["LOCAL_WORLD_SIZE"] = str(ray.train.get_context().get_local_world_size())
    request = dict(config["request"])
    request["assignments"] = tuple(request["assignments"])  # Ray turns tuples into lists
    request["tables"] = tuple(map(tuple, request["tables"]))
    try:
        report = train(Request(**request))
        return asdict(report) | {"run": str(report.run)}
    except LoaderError:
        raise  # an error of this process alone: Ray must end the others, which wait for it
    except UserError as error:
        return {"mistake": str(error)}
