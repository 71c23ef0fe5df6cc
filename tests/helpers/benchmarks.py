"""Make small folders in the published layouts of the retrieval benchmarks, with empty files as videos."""

import json
import pickle
from pathlib import Path

LSMDC_CLIPS = [
    "0001_American_Beauty_00.00.51.926-00.00.54.129",
    "0001_American_Beauty_00.01.02.000-00.01.05.100",
    "1054_Harry_Potter_and_the_prisoner_of_azkaban_01.31.03.400-01.31.05.800",
]
MSVD_VIDEOS = ["-4wsuPCjDBc_5_15", "mv89psg6zh4_33_46", "PeUHy0A1GF0_114_121"]
DIDEMO_VIDEOS = ["26292851@N04_4253489686_265c3c8051.m4v", "10015567@N08_3655084291_d8b58466fb.mov"]
VATEX_VIDEOS = ["Ptf_2VRj-V0_000122_000132", "_rjDr0T5zLI_000003_000013"]


def put(path: Path, content: object = b"") -> Path:
    """Write bytes and text unchanged, and tables as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def put_videos(folder: Path, *names: str) -> None:
    for name in names:
        put(folder / name)


def msrvtt(folder: Path, num_train: int = 3, num_test: int = 2, num_captions: int = 20) -> Path:
    """Write MSR-VTT: training videos, then those of 1k-A; the last two are val and test in the file's own split."""
    count = num_train + num_test
    splits = ["train"] * (count - 2) + ["validate", "test"]
    videos = [
        {
            "category": i % 20,
            "url": f"https://www.youtube.com/watch?v=abcdefghij{i % 10}",
            "video_id": f"video{i}",
            "start time": 137.72,
            "end time": 149.44,
            "split": splits[i],
            "id": i,
        }
        for i in range(count)
    ]
    sentences = [
        {"caption": f"caption {k} of {i}", "video_id": f"video{i}", "sen_id": i * num_captions + k}
        for i in range(count)
        for k in range(num_captions)
    ]
    put(folder / "MSRVTT_data.json", {"info": {"year": "2016"}, "videos": videos, "sentences": sentences})
    train = [f"video{i}" for i in range(num_train)]
    put(folder / "MSRVTT_train.9k.csv", "\n".join(["video_id", *train]) + "\n")
    put(folder / "MSRVTT_train.7k.csv", "\n".join(["video_id", *train[:-1]]) + "\n")
    rows = [f'ret{i},msr{i},video{i},"the one sentence, of {i}"' for i in range(num_train, count)]
    put(folder / "MSRVTT_JSFUSION_test.csv", "\n".join(["key,vid_key,video_id,sentence", *rows]) + "\n")
    put_videos(folder / "videos", *(f"video{i}.mp4" for i in range(count)))
    return folder


def msvd(folder: Path) -> Path:
    for split, video in zip(("train", "val", "test"), MSVD_VIDEOS, strict=True):
        put(folder / f"{split}_list.txt", f"{video}\n")
    captions = {video: [["a", "bird", str(k)] for k in range(3)] for video in MSVD_VIDEOS}
    put(folder / "raw-captions.pkl", pickle.dumps(captions, protocol=2))
    put_videos(folder / "YouTubeClips", *(f"{video}.avi" for video in MSVD_VIDEOS))
    return folder


def lsmdc(folder: Path) -> Path:
    def lines(*pairs: tuple[str, str]) -> str:
        times = "00.00.51.926\t00.00.54.129\t00.00.50.000\t00.00.55.000"
        return "".join(f"{clip}\t{times}\t{sentence}\n" for clip, sentence in pairs)

    first, second, third = LSMDC_CLIPS
    put(
        folder / "LSMDC16_annos_training.csv",
        lines((first, 'SOMEONE says "no".'), (first, "He leaves."), (second, "x")),
    )
    put(folder / "LSMDC16_challenge_1000_publictect.csv", lines((third, "A stag.")))
    for clip in LSMDC_CLIPS:
        put(folder / "avi" / clip.rpartition("_")[0] / f"{clip}.avi")
    return folder


def didemo(folder: Path) -> Path:
    def moment(video: str, description: str, *times: list[int]) -> dict:
        link = "https://www.flickr.com/video_download.gne?id=1"
        row = {"num_segments": 6, "description": description, "dl_link": link, "times": list(times), "video": video}
        return row | {"annotation_id": 1}

    first, second = DIDEMO_VIDEOS
    train = [
        moment(first, "someone kicks the bug.", [4, 4], [4, 4], [0, 0], [4, 4]),
        moment(first, " the camera pans ", [0, 1], [0, 1]),
    ]
    put(folder / "train_data.json", train)
    put(folder / "test_data.json", [moment(second, "a dog", [1, 2])])
    put_videos(folder / "videos", first, second.replace(".mov", ".mp4"))
    return folder


def activitynet(folder: Path) -> Path:
    def video(*sentences: str) -> dict:
        times = [[10.0 * k, 10.0 * k + 15.5] for k in range(len(sentences))]
        return {"duration": 82.73, "timestamps": times, "sentences": list(sentences)}

    put(folder / "train.json", {"v_QOlSCBRmfWY": video("A woman stands. ", " She speaks.")})
    put(folder / "val_1.json", {"v_uqiMw7tQ1Cc": video("A weight lifting tutorial.", "He lifts.")})
    put(folder / "val_2.json", {"v_uqiMw7tQ1Cc": video("Somebody else's words.")})
    put_videos(folder / "videos", "v_QOlSCBRmfWY.mp4", "uqiMw7tQ1Cc.mkv")
    return folder


def vatex(folder: Path) -> Path:
    def row(video: str) -> dict:
        return {"videoID": video, "enCap": [f"en {k}" for k in range(10)], "chCap": [f"中 {k}" for k in range(10)]}

    put(folder / "vatex_training_v1.0.json", [row(VATEX_VIDEOS[0])])
    put(folder / "vatex_validation_v1.0.json", [row(VATEX_VIDEOS[1])])
    put_videos(folder, *(f"{video}.mp4" for video in VATEX_VIDEOS))
    return folder
