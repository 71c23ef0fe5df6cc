"""Ray accepts the cluster file and its variants in docs/cluster.md."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/cluster.md").read_text()
BLOCKS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
CLOUDS = {block["provider"]["type"]: block for block in BLOCKS if "provider" in block}


def ours() -> dict:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def validated(config: dict) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def test_ray_takes_the_cluster_file():
    assert validated(ours())["available_node_types"]["local.cluster.node"]["min_workers"] == 2


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_takes_the_cluster_file_with_a_cloud_in_it(cloud):
    config = {key: value for key, value in ours().items() if key not in ("provider", "auth", "min_workers")}
    prepared = validated(config | CLOUDS[cloud])
    assert prepared["available_node_types"]["cut"]["max_workers"] == 16
    assert any("make env" in command for command in prepared["setup_commands"])


def test_ray_refuses_invalid_cluster_files():
    with pytest.raises(Exception, match="no_such_key"):
        validated(ours() | {"no_such_key": 1})


def test_the_kubernetes_cluster_mounts_the_corpus_everywhere_and_marks_no_cpu_on_the_head():
    (cluster,) = (block for block in BLOCKS if block.get("kind") == "RayCluster")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in groups:
        pod = group["template"]["spec"]
        assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/mnt/corpus"]
        assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "corpus"
