"""`clipmill plan` estimates a run: clips and steps equal the run's, and costs match measurements."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from clipmill.base.errors import UserError
from clipmill.cli.estimate import run_plan
from tests.helpers.shards import make_corpus, pack
from training.cost.estimate import Device, StepCost, estimate, speed_on
from training.cost.footprint import kept_bytes
from training.data.epoch_files import Epochs, plan_spec, total_steps
from training.data.epoch_plan import plan_path
from training.data.selection import Selection, freeze_run
from training.data.selection_schema import EVAL_FILE, SELECTION_FILE
from training.models import registry as models
from training.models.clip_vip.model import ClipVip, ModelConfig, TowerConfig, sample_flops
from training.run.settings import resolve
from training.settings import DataSettings, TrainSettings

NUM_CLIPS = 90
HELD_OUT = "video_id = (SELECT min(video_id) FROM videos)"
ASSIGNMENTS = [f"eval.where={HELD_OUT}", "train.batch_size=8"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = make_corpus(tmp_path_factory.mktemp("planned") / "corpus", NUM_CLIPS)
    pack(root)
    return root


@pytest.fixture(scope="module")
def settings():
    return resolve(None, "demo", ASSIGNMENTS)


@pytest.fixture(scope="module")
def found(corpus, settings):
    return estimate(corpus, settings, gpus=["H100"])


def test_its_counts_are_those_of_the_run(corpus, settings, found, tmp_path):
    training, held_out = freeze_run(tmp_path, corpus, settings.data, settings.eval)
    selection = Selection(tmp_path / SELECTION_FILE)
    assert found.data.num_clips == selection.num_clips == training.num_clips
    assert found.data.num_held_out == Selection(tmp_path / EVAL_FILE).num_clips == held_out.num_clips
    assert found.data.num_excluded == training.num_excluded > 0
    assert found.data.num_shards == len(set(selection.column("shard").to_pylist()))
    assert found.data.read_bytes == sum(selection.column("mp4_bytes").to_pylist())
    subtitles, captions = (selection.column(name).to_pylist() for name in ("subtitle", "caption"))
    assert found.data.num_without_subtitle == sum(not text for text in subtitles)
    assert found.data.num_without_caption == sum(not text for text in captions)
    assert found.data.num_short == sum(n < settings.data.num_frames for n in selection.column("num_frames").to_pylist())


def test_its_steps_and_files_are_those_of_the_run(corpus, settings, found, tmp_path):
    freeze_run(tmp_path, corpus, settings.data, settings.eval)
    selection = Selection(tmp_path / SELECTION_FILE)
    spec = plan_spec(selection, settings.data, settings.train.batch_size)
    epochs = Epochs(tmp_path, spec, selection.path, settings.data.apart)
    said = epochs.describe(0)
    assert found.step.steps_per_epoch == said["num_steps"] and found.step.num_dropped == said["num_left"]
    assert found.step.total_steps == total_steps(spec, settings.train) == settings.train.epochs * said["num_steps"]
    assert 0 <= plan_path(tmp_path, spec, 0).stat().st_size - found.data.plan_bytes < 1000
    assert found.data.selection_bytes == pytest.approx(selection.path.stat().st_size, rel=0.3)


def test_captioned_stills_are_read_with_their_clip(corpus, settings):
    still = settings.model_copy(update={"data": settings.data.model_copy(update={"still": "captioned"})})
    with_stills, without = estimate(corpus, still, gpus=[]).data, estimate(corpus, settings, gpus=[]).data
    assert with_stills.read_bytes > without.read_bytes
    assert with_stills.num_reads == without.num_reads  # the picture is stored just before the clip


def test_parameters_and_flops_are_the_models(settings, found):
    model = models.load(settings.model)
    assert found.step.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    length = settings.data.max_text_tokens
    flops = sample_flops(model.config, settings.data.num_frames, 1, (length, length))
    assert found.step.flops_per_step == 8 * flops


def test_a_published_model_is_sized_without_its_weights(corpus):
    """It has 374 GFLOP per sample and 11,520 more parameters than the CLIP without proxies."""
    settings = resolve(None, "clip_vip_b32", ["train.batch_size=8"])
    step = estimate(corpus, settings, gpus=["H200"]).step
    assert step.num_parameters == 151_277_313 + 3 * 768 + 12 * 768
    assert step.flops_per_step / 8 == pytest.approx(374e9, rel=0.01)


# --- Memory


def kept_by_autograd(model, encode, precision):
    """Return the bytes that a forward pass keeps for its backward pass, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            features = encode()
    del features
    return sum(num_bytes for num_bytes, _ in storages.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_layers", [6, pytest.param(9, marks=pytest.mark.slow)])
def test_activations_are_as_many_as_autograd_keeps(precision, num_layers):
    """With checkpointing, this adds one block's activations, which exist while it is recomputed."""
    vision, text = TowerConfig(256, num_layers, 4, 1024), TowerConfig(128, num_layers, 2, 512)
    config = ModelConfig(vision, text, embed_dim=64, image_size=96, patch_size=16, vocab_size=100)
    model, data = ClipVip(config), DataSettings(num_frames=12, max_text_tokens=70)
    model.initialise()
    pixels, still, ids = torch.rand(1, 12, 3, 96, 96), torch.rand(1, 1, 3, 96, 96), torch.full((2, 70), 5)
    ids[:, -1] = 99
    # counted separately: pixels, and the bf16 copies of the blocks' matrices
    inputs = (pixels.numel() + still.numel()) * (4 if precision == "fp32" else 2)
    casts = sum(2 * p.numel() for name, p in model.named_parameters() if "blocks" in name and p.ndim == 2)

    def measured(checkpointing):
        model.set_activation_checkpointing(checkpointing)
        kept = kept_by_autograd(model, lambda: model.encode_video(pixels) + model.encode_video(still), precision)
        kept += kept_by_autograd(model, lambda: model.encode_text(ids), precision)
        return kept - inputs - (casts if precision == "bf16" and not checkpointing else 0)

    def said(checkpointing):
        return kept_bytes(config, data, TrainSettings(precision=precision, activation_checkpointing=checkpointing))

    whole = measured(False)
    assert said(False) == pytest.approx(whole, rel=0.15)
    assert said(True) == pytest.approx(measured(True) + whole / (num_layers - 1), rel=0.25)


def test_settings_that_save_memory_do(corpus, settings):
    found = estimate(corpus, settings, gpus=[])
    assert found.with_checkpointing.activations < found.memory.activations
    assert found.with_chunks.total <= found.memory.total
    sharded = settings.model_copy(update={"train": settings.train.model_copy(update={"parallel": "fsdp"})})
    alone, shared = (estimate(corpus, sharded, num_devices=n, gpus=[]).memory for n in (1, 2))
    assert shared.weights == alone.weights // 2 and shared.optimiser == alone.optimiser // 2
    assert shared.activations == alone.activations // 2


# --- Time


def test_twice_the_devices_take_half_the_time_and_twice_the_cores():
    step = StepCost(100, 500, 0, 1024, 128, 10**8, 10**8, 1024 * 374e9)
    one, two = (speed_on(Device("H100", "cuda", 989e12), n, step, 13 * 224**2) for n in (1, 2))
    assert one.total_s == pytest.approx(2 * two.total_s) and two.decoding_cores == pytest.approx(2 * one.decoding_cores)
    assert one.samples_per_s == pytest.approx(0.45 * 989e12 / 374e9)
    assert one.decoding_cores == pytest.approx(one.samples_per_s / 60)


# --- The command


def test_it_prints_a_page_that_a_person_can_read(corpus):
    out = io.StringIO()
    run_plan(corpus, recipe="demo", assignments=ASSIGNMENTS, console=Console(file=out, width=120))
    text = out.getvalue()
    for said in ("to train on", "held out", "steps per epoch", "memory per device", "this CPU", "H100", "assumed"):
        assert said in text, said
    assert len(text.splitlines()) < 50


def test_it_answers_in_json_too(corpus, capsys):
    run_plan(corpus, recipe="demo", assignments=ASSIGNMENTS, where="num_frames > 3", gpus=["A100"], format="json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["data"]["num_clips"] < NUM_CLIPS and [speed["device"] for speed in answer["speeds"]][1:] == ["A100"]


def test_plain_tars_are_estimated_like_a_corpus(corpus):
    settings = resolve(None, None, ["model.init=demo", "data.max_text_tokens=40", "train.batch_size=8"])
    assert estimate(f"{corpus}/shards/*.tar", settings, gpus=[]).data.num_clips == NUM_CLIPS


@pytest.mark.parametrize(
    "options, message",
    [
        ({"where": "no_such_column = 1"}, "data.where"),
        ({"where": "true", "select": "SELECT clip_id FROM clips"}, "--select or --where"),
        ({"workers": 3}, "3 processes"),
        ({"workers": 0}, "--workers 0"),
        ({"gpus": ["abacus"]}, "abacus.*train.peak_tflops"),
        ({"assignments": ["train.batch_size=1000"]}, "train.batch_size = 1000"),
        ({"assignments": ["data.max_text_tokens=500"]}, "data.max_text_tokens"),
        ({"assignments": ["model.init=absent"]}, "absent"),
        ({"assignments": ["eval.where=n < 3", "eval.overlap=error"]}, "eval.overlap"),
        ({"recipe": "no_such"}, "no_such"),
    ],
)
def test_a_mistake_is_reported_before_the_run(corpus, options, message):
    options = {"recipe": "demo"} | options
    with pytest.raises(UserError, match=message):
        run_plan(corpus, **(options | {"assignments": [*ASSIGNMENTS, *options.get("assignments", [])]}))


@pytest.mark.slow
def test_it_starts_nothing_and_writes_nothing(corpus):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    code = (
        "import sys; from clipmill.cli.estimate import run_plan;"
        f"run_plan({str(corpus)!r}, recipe='demo', assignments={ASSIGNMENTS!r}, gpus=['H100']);"
        "ray = sys.modules.get('ray'); assert ray is None or not ray.is_initialized(), 'Ray was started'"
    )
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "clips to train on" in done.stdout, done.stderr
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_the_estimate_is_of_the_settings_it_is_given(corpus):
    given = ["model.init=demo", "data.max_text_tokens=40", "train.batch_size=4", "train.max_steps=7"]
    found = estimate(corpus, resolve(None, None, given), gpus=[])
    assert found.step.total_steps == 7 and found.step.batch_size == 4 and found.data.num_held_out == 0
