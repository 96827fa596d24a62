"""Ingest as a user runs it: what goes in comes out, and bad data is one line and nothing left."""

import json
import re

import pyarrow as pa
import pytest
import torch
from torchvision.io import decode_image, write_jpeg, write_png

from cluster.conversion import build_shard, stored_sizes
from cluster.datasets import find_sources, read_taxonomy
from cluster.ingest import IngestConfig, check, ingest, plan_shards
from cluster.layouts import DATASETS
from cluster.manifest import read_manifest
from cluster.reader import ShardReader
from cluster.storage import StorageConfig, open_storage
from jobs.command_line import run
from tests.processes import run_module


def user_runs(*arguments):
    """`python -m jobs.ingest ARGUMENTS` on the test cluster."""
    return run_module("jobs.ingest", [str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The one line of a command that is refused before work starts, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        run(_never, IngestConfig, check=check, arguments=[str(part) for part in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def _never(config):
    pytest.fail("work started")


def storage_at(url):
    return open_storage(str(url), StorageConfig())


def test_a_user_ingests_into_a_bucket(joined, folder, s3):
    url = f"{s3.make_bucket('ingest')}/day"
    done = user_runs("--root", folder, "--to", url, "--storage.endpoint", s3.endpoint,
        "--shard_bytes", 4000, "--size", "32x24",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.match(rf"wrote 12 images, [\d.]+ MB, in \d+ shards to {url}\n", done.stdout)
    assert re.search(r"ingest: 100% 12/12 .*(image/s|s/image)", done.stderr)
    storage = open_storage(url, StorageConfig(endpoint=s3.endpoint))
    manifest = read_manifest(storage)
    assert len(manifest) == 12 and manifest.image_size == (24, 32) and len(manifest.shards) > 2
    assert manifest.options == {
        "dataset": "folder", "split": "all", "size": "32x24", "shard_bytes": 4000
    }  # fmt: skip
    sample = ShardReader(storage, manifest).read(0)
    assert sample.image.shape == (3, 24, 32) and sample.label.shape == (24, 32)
    assert int(manifest.pixel_counts[0].sum()) == int((sample.label != 255).sum())


def test_a_user_s_bad_file_is_one_line_and_no_data_set(joined, make_folder, tmp_path):
    root = make_folder(tmp_path / "data")
    (root / "images/frame010.jpg").write_bytes(b"no image")
    done = user_runs("--root", root, "--to", tmp_path / "out", "--shard_bytes", 1)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: {root}/images/frame010.jpg does not decode as an image: replace it"
    )
    assert "Traceback" not in done.stderr
    assert not storage_at(tmp_path / "out").exists("manifest.arrow")


def test_a_bad_flag_is_one_line(folder, tmp_path, capsys):
    error = refused(capsys, "--root", folder, "--to", tmp_path / "out", "--sise", "32x24")
    assert error == "error: unrecognized arguments: --sise 32x24\n"


def test_images_and_labels_that_keep_their_size_keep_their_content(ray_cluster, folder, tmp_path):
    ingest(IngestConfig(root=str(folder), to=str(tmp_path)))
    storage = storage_at(tmp_path)
    manifest = read_manifest(storage)
    payload = ShardReader(storage, manifest).fetch([3])[0].to_pybytes()
    assert (folder / "images/frame003.jpg").read_bytes() in payload


def test_shards_do_not_depend_on_tasks_or_on_the_order_of_the_list(ray_cluster, folder, tmp_path):
    stems = [f"frame{i:03d}" for i in (7, 2, 9, 0, 4, 11)]
    for name, listed in (("a", stems), ("b", stems[::-1])):
        (tmp_path / f"{name}.txt").write_text("\n".join(listed) + "\n\n")
        config = IngestConfig(
            root=str(folder),
            to=str(tmp_path / name),
            list=str(tmp_path / f"{name}.txt"),
            size="40x30",
            shard_bytes=3000,
        )
        ingest(config)
    names = storage_at(tmp_path / "a").list()
    assert len(names) > 2 and names == storage_at(tmp_path / "b").list()
    for name in names:
        assert storage_at(tmp_path / "a").get(name) == storage_at(tmp_path / "b").get(name)
    # The same shards, built one after the other in this process.
    own = DATASETS["folder"]
    sources = find_sources(folder, own, None, str(tmp_path / "a.txt"), True)
    taxonomy = read_taxonomy(folder, own, None)
    for begin, end in plan_shards(stored_sizes(sources, taxonomy, (30, 40)), 3000):
        data, _ = build_shard(sources[begin:end], taxonomy, (30, 40))
        assert any(data.equals(pa.py_buffer(storage_at(tmp_path / "a").get(n))) for n in names)


def test_shards_end_when_they_are_full():
    assert plan_shards([5, 5, 5, 5, 1], 10) == [(0, 2), (2, 4), (4, 5)]
    assert plan_shards([50, 1, 50], 10) == [(0, 1), (1, 3)]
    assert plan_shards([1], 10) == [(0, 1)]


def test_an_unlabelled_target_needs_no_labels(ray_cluster, make_folder, tmp_path):
    root = make_folder(tmp_path / "data", count=3)
    for path in (root / "labels").iterdir():
        path.unlink()
    (root / "labels").rmdir()
    manifest = ingest(IngestConfig(root=str(root), to=str(tmp_path / "out"), labels=False))
    assert len(manifest) == 3 and not manifest.labelled


def test_the_class_file_may_lie_above_or_elsewhere(make_folder, tmp_path):
    root = make_folder(tmp_path / "data", count=1)
    (root / "classes.json").rename(tmp_path / "classes.json")
    own = DATASETS["folder"]
    assert read_taxonomy(root, own, None).num_classes == 5
    assert read_taxonomy(root, own, str(tmp_path / "classes.json")).num_classes == 5


def _wrong_size(root):
    write_png(torch.zeros(1, 24, 64, dtype=torch.uint8), str(root / "labels/frame001.png"))
    return r"labels/frame001.png is 64x24 but its image .*frame001.jpg is 64x48: they must be"


def _outside_value(root):
    write_png(torch.full((1, 48, 64), 5, dtype=torch.uint8), str(root / "labels/frame001.png"))
    return r"labels/frame001.png holds the value 5, but the classes are 0..4 and 255"


def _color_label(root):
    write_png(torch.zeros(3, 48, 64, dtype=torch.uint8), str(root / "labels/frame001.png"))
    return r"labels/frame001.png is no 8-bit grayscale PNG"


def _truncated_image(root):
    path = root / "images/frame001.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    return r"images/frame001.jpg does not decode"


def _truncated_label(root):
    path = root / "labels/frame001.png"
    path.write_bytes(path.read_bytes()[:60])
    return r"labels/frame001.png does not decode as a PNG"


@pytest.mark.parametrize(
    "spoil", [_wrong_size, _outside_value, _color_label, _truncated_image, _truncated_label]
)
def test_bad_data_is_named_and_an_earlier_data_set_stays(ray_cluster, make_folder, tmp_path, spoil):
    root = make_folder(tmp_path / "data", count=4)
    config = IngestConfig(root=str(root), to=str(tmp_path / "out"), shard_bytes=1)
    ingest(config)
    before = storage_at(tmp_path / "out").list()
    message = spoil(root)
    write_jpeg(torch.zeros(3, 48, 64, dtype=torch.uint8), str(root / "images/frame003.jpg"))
    with pytest.raises(ValueError, match=message):
        ingest(config)
    storage = storage_at(tmp_path / "out")
    assert storage.list() == before
    manifest = read_manifest(storage)
    reader = ShardReader(storage, manifest)
    assert [reader.read(i).key for i in range(4)] == list(manifest.keys)


def _missing_root(root):
    return ["--root", root / "no"], r"no folder .*/no/images: --root must hold images/ and labels/"


def _empty_folder(root):
    for path in (root / "images").iterdir():
        path.unlink()
    return [], r"no images \(.jpg, .jpeg, .png\) in .*/images"


def _missing_label(root):
    (root / "labels/frame002.png").unlink()
    return [], r"1 images have no label, first .*labels/frame002.png: .*--labels false"


def _missing_list(root):
    return ["--list", "no.txt"], r"no list file .*/no.txt"


def _unknown_stem(root):
    (root / "list.txt").write_text("frame000\nframe999\n")
    return ["--list", "list.txt"], r"list.txt lists 'frame999', which is not in .*images"


def _repeated_stem(root):
    (root / "list.txt").write_text("frame000\nframe000\n")
    return ["--list", "list.txt"], r"list.txt lists 'frame000' twice"


def _empty_list(root):
    (root / "list.txt").write_text("\n")
    return ["--list", "list.txt"], r"list.txt lists nothing"


def _two_images_of_one_stem(root):
    write_png(torch.zeros(3, 48, 64, dtype=torch.uint8), str(root / "images/frame001.png"))
    return [], r"frame001.jpg and .*frame001.png have one stem"


def _missing_classes(root):
    (root / "classes.json").unlink()
    return [], r"no class file at .*classes.json nor .*: name one with --classes"


def _broken_classes(root):
    (root / "classes.json").write_text(json.dumps({"classes": [{"train_id": 0}]}))
    return [], r"classes.json: classes need 'train_id', 'name' and 'color'"


def _no_json(root):
    (root / "classes.json").write_text("{")
    return [], r"classes.json: Expecting"


def _bad_size(root):
    return ["--size", "32"], r"size '32' must be WIDTHxHEIGHT"


def _bad_number(root):
    return ["--shard_bytes", "many"], r'"shard_bytes".*int'


def _unknown_scheme(root):
    return ["--to", "ftp://host/x"], r"cannot read the URL 'ftp://host/x'"


def _wrong_endpoint(root):
    options = ["--to", "s3://bucket/x", "--storage.endpoint", "http://127.0.0.1:1"]
    return options, r"s3://bucket/x: .*check --storage.endpoint"


def _endpoint_without_scheme(root):
    return ["--storage.endpoint", "host:80"], r"storage.endpoint 'host:80' must start with http"


@pytest.mark.parametrize(
    "mistake",
    [
        _missing_root, _empty_folder, _missing_label, _missing_list, _unknown_stem, _repeated_stem,
        _empty_list, _two_images_of_one_stem, _missing_classes, _broken_classes, _no_json,
        _bad_size, _bad_number, _unknown_scheme, _wrong_endpoint, _endpoint_without_scheme,
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_work_starts(make_folder, tmp_path, capsys, mistake):
    root = make_folder(tmp_path / "data", count=3)
    extra, message = mistake(root)
    error = refused(capsys, "--root", root, "--to", tmp_path / "out", *extra)
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_resized_labels_keep_their_values(ray_cluster, folder, tmp_path):
    manifest = ingest(IngestConfig(root=str(folder), to=str(tmp_path), size="32x24"))
    label = ShardReader(storage_at(tmp_path), manifest).read(0).label
    original = decode_image(folder / "labels/frame000.png")[0]
    # Blocks of 8 pixels become blocks of 4: every value survives where it was.
    assert torch.equal(label, original[::2, ::2])
