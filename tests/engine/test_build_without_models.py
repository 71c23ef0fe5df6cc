"""Captions and scores can be switched off for a build, and on again later."""

import shutil

import pytest

from clipmill.base.errors import UserError
from pipeline.engine.registry import stage_names
from tests.helpers.builds import ask, build_here, clipmill

pytestmark = pytest.mark.slow
OFF = ("caption.captioner=null", "score.model=null")


def test_a_build_without_captions_and_scores_is_complete_and_gets_them_when_they_are_turned_on(
    world, tmp_path, local_ray
):
    working = next(row for row in world.truth.values() if row["works"] and row["broken"] is None)
    video = shutil.copy(world.folder / working["file"], tmp_path)
    corpus = tmp_path / "corpus"
    report = build_here(corpus, [str(video)], *OFF)
    assert report.exit_code == 0 and set(report.engine.by_stage) == {"download", "transcribe", "segment", "cut"}
    num_clips = ask(corpus, "SELECT count(*) FROM clips")[0][0]
    assert ask(corpus, "SELECT count(*), count(caption), count(caption_similarity) FROM catalog") == [(num_clips, 0, 0)]
    assert ask(corpus, "SELECT count(*) FROM samples") == [(num_clips,)]
    status = clipmill("status", corpus).stdout.splitlines()
    assert [line.split() for line in status if "off" in line] == [["caption", "off"], ["score", "off"]]
    with pytest.raises(UserError, match="caption.captioner is null"):
        build_here(corpus, [], stages=["caption"], recipe=None)
    assert not build_here(corpus, [], recipe=None).did_something

    antidote = str(tmp_path)  # a captioner that loads no model and fails at no picture
    turned_on = ("caption.captioner=tests.helpers.poison:Poisoned", f"caption.options={{antidote: {antidote}}}")
    report = build_here(corpus, [], *turned_on, recipe=None)
    assert report.exit_code == 0 and set(report.engine.by_stage) == {*stage_names()} - {"ingest", "score", "pack"}
    assert report.engine.num_done == num_clips
    assert ask(corpus, "SELECT count(caption), count(caption_similarity) FROM catalog") == [(num_clips, 0)]
