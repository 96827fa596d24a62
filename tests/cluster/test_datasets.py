"""Every published layout, made small in its own file formats, comes out as train ids."""

import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster.datasets import find_sources, read_taxonomy
from cluster.ingest import IngestConfig, build_shard, check, ingest
from cluster.layouts import DATASETS
from cluster.sources import Source, read_label
from jobs.command_line import run
from sepico.taxonomies import CITYSCAPES_13, CITYSCAPES_16, CITYSCAPES_19

SIZE = (12, 20)  # H, W of every image here
GOLDEN = np.load(Path(__file__).parents[1] / "data/labelid.npz")
# Every id of the Cityscapes table, and 34, which GTAV has beyond it.
LABEL_IDS = np.resize(np.arange(35, dtype=np.uint8), SIZE)
TRAIN_IDS = np.resize(np.array([*range(19), 255], np.uint8), SIZE)


def write_image(path, seed=0):
    """A random RGB image, as a PNG or a JPEG by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, len(path.name)]).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_grey(path, plane):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(plane).save(path)


def write_palette(path, plane):
    """Indexed colours as GTAV has them: the index is the label id, the palette only shows it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.frombytes("P", plane.shape[::-1], plane.tobytes())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)


def write_16_bit(path, planes):
    """(H, W, 3) uint16 as SYNTHIA has it: class, instance, nothing. Pillow writes no such PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = planes.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in planes)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
    )


def make_gtav(root):
    for i, stem in enumerate(("00001", "00002", "24966")):
        write_image(root / f"images/{stem}.png", i)
        write_palette(root / f"labels/{stem}.png", LABEL_IDS)


def make_synthia(root):
    planes = np.zeros((*SIZE, 3), np.uint16)
    planes[..., 0] = np.resize(np.arange(23), SIZE)
    planes[..., 1] = np.resize(np.arange(300, 700), SIZE)  # instances, beyond a byte
    for i, stem in enumerate(("0000000", "0009399")):
        write_image(root / f"RGB/{stem}.png", i)
        write_16_bit(root / f"GT/LABELS/{stem}.png", planes)
        write_16_bit(root / f"GT/COLOR/{stem}.png", planes * 0)


def make_cityscapes(root):
    for split, city in (("train", "aachen"), ("train", "zurich"), ("val", "lindau")):
        stem = f"{split}/{city}/{city}_000000_000019"
        write_image(root / f"leftImg8bit/{stem}_leftImg8bit.png", len(city))
        write_grey(root / f"gtFine/{stem}_gtFine_labelIds.png", LABEL_IDS)
        write_grey(root / f"gtFine/{stem}_gtFine_instanceIds.png", LABEL_IDS * 0)
    write_image(root / "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png")


def make_dark_zurich(root):
    for i, frame in enumerate(("GOPR0351/GOPR0351_frame_000071", "GP010352/GP010352_frame_000001")):
        write_image(root / f"rgb_anon/train/night/{frame}_rgb_anon.png", i)
    for i, frame in enumerate(("GOPR0345/GOPR0345_frame_000009", "GOPR0345/GOPR0345_frame_000010")):
        write_image(root / f"rgb_anon/train/day/{frame}_rgb_anon.png", 10 + i)
    write_csv(root, "GOPR0351", "GOPR0351_frame_000071", "GOPR0345_frame_000010")
    write_csv(root, "GP010352", "GP010352_frame_000001", "GOPR0345_frame_000009")
    frame = "GOPR0356/GOPR0356_frame_000324"
    write_image(root / f"rgb_anon/val/night/{frame}_rgb_anon.png", 3)
    write_image(
        root / "rgb_anon/val_ref/day/GOPR0356_ref/GOPR0356_frame_000324_ref_rgb_anon.png", 4
    )
    write_grey(root / f"gt/val/night/{frame}_gt_labelTrainIds.png", TRAIN_IDS)
    write_grey(root / f"gt/val/night/{frame}_gt_labelIds.png", LABEL_IDS)
    write_image(root / "rgb_anon/test/night/GOPR0364/GOPR0364_frame_000001_rgb_anon.png", 5)


def write_csv(root, sequence, night, day):
    path = root / f"corresp/train/night/{sequence}/{sequence}_corresp.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"train/night/{sequence}/{night},train/day/GOPR0345/{day}\n")


def make_nighttime_driving(root):
    for i, stem in enumerate(("0_frame_0075", "01_frame_0555")):
        write_image(root / f"leftImg8bit/test/night/{stem}_leftImg8bit.png", i)
        coarse = root / f"gtCoarse_daytime_trainvaltest/test/night/{stem}_gtCoarse"
        write_grey(coarse.with_name(f"{coarse.name}_labelTrainIds.png"), TRAIN_IDS)
        write_grey(coarse.with_name(f"{coarse.name}_labelIds.png"), LABEL_IDS)


def make_bdd100k_night(root):
    names = ("train/00aad4a0-ee8135fe", "train/ffffffff-0000000d", "val/81d5165d-fcfc6c67")
    for i, name in enumerate(names):
        write_image(root / f"images/10k/{name}.jpg", i)
        write_grey(root / f"labels/sem_seg/masks/{name}.png", TRAIN_IDS)
    lines = [f"seg/labels/{name}_train_id.png\n" for name in (names[0], names[2])]
    (root / "gt_trainval_night_correct_filenames.txt").write_text("".join(lines))


def make_acdc(root):
    for i, condition in enumerate(("fog", "night", "rain", "snow")):
        for split in ("train", "val", "test"):
            frame = f"{condition}/{split}/GOPR0{i}/GOPR0{i}_{split}_frame_000041"
            write_image(root / f"rgb_anon/{frame}_rgb_anon.png", i)
            if split != "test":
                write_grey(root / f"gt/{frame}_gt_labelTrainIds.png", TRAIN_IDS)
        reference = f"{condition}/train_ref/GOPR0{i}/GOPR0{i}_train_frame_000041_rgb_ref_anon.png"
        write_image(root / "rgb_anon" / reference, 7)


MAKE = {
    "gtav": make_gtav,
    "synthia": make_synthia,
    "cityscapes": make_cityscapes,
    "dark_zurich": make_dark_zurich,
    "nighttime_driving": make_nighttime_driving,
    "bdd100k_night": make_bdd100k_night,
    "acdc": make_acdc,
}
ACDC_KEYS = [f"GOPR0{i}_{{}}_frame_000041" for i in range(4)]
EXPECTED_KEYS = {
    ("gtav", "train"): ["00001", "00002", "24966"],
    ("synthia", "train"): ["0000000", "0009399"],
    ("cityscapes", "train"): ["aachen_000000_000019", "zurich_000000_000019"],
    ("cityscapes", "val"): ["lindau_000000_000019"],
    ("cityscapes", "test"): ["berlin_000000_000019"],
    ("dark_zurich", "train"): ["GOPR0351_frame_000071", "GP010352_frame_000001"],
    ("dark_zurich", "val"): ["GOPR0356_frame_000324"],
    ("dark_zurich", "test"): ["GOPR0364_frame_000001"],
    ("nighttime_driving", "test"): ["01_frame_0555", "0_frame_0075"],
    ("bdd100k_night", "test"): ["00aad4a0-ee8135fe", "81d5165d-fcfc6c67"],
    ("acdc", "train"): [key.format("train") for key in ACDC_KEYS],
    ("acdc", "val"): [key.format("val") for key in ACDC_KEYS],
    ("acdc", "test"): [key.format("test") for key in ACDC_KEYS],
}


def sources_of(name, root, split=None, labels=True):
    return find_sources(root, DATASETS[name], split, None, labels)


def rows_of(sources, taxonomy=CITYSCAPES_19, size=None):
    """The shard of `sources` as plain pyarrow reads it; label planes decompressed."""
    data, _ = build_shard(sources, taxonomy, size)
    rows = pa.ipc.open_file(data).read_all().to_pylist()
    for row in rows:
        if row["label"] is not None:
            shape = row["height"], row["width"]
            plane = pa.decompress(row["label"], shape[0] * shape[1], codec="lz4")
            row["label"] = np.frombuffer(plane, np.uint8).reshape(shape)
    return rows


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.mark.parametrize(("name", "split"), EXPECTED_KEYS)
def test_a_split_holds_its_images_under_their_own_bytes(tmp_path, name, split):
    MAKE[name](tmp_path)
    labels = split not in DATASETS[name].unlabelled
    sources = sources_of(name, tmp_path, split, labels)
    assert [source.key for source in sources] == EXPECTED_KEYS[name, split]
    for source, row in zip(sources, rows_of(sources), strict=True):
        assert row["key"] == source.key and (row["height"], row["width"]) == SIZE
        assert row["image"] == source.image.read_bytes()
        assert (row["label"] is not None) == labels
        assert (row["reference"] is not None) == ((name, split) == ("dark_zurich", "train"))


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("gtav", "train", GOLDEN["gta_id2train"][LABEL_IDS]),
        ("cityscapes", "val", GOLDEN["cs_id2train"][LABEL_IDS]),
        ("dark_zurich", "val", TRAIN_IDS),
        ("nighttime_driving", "test", TRAIN_IDS),
        ("bdd100k_night", "test", TRAIN_IDS),
        ("acdc", "train", TRAIN_IDS),
    ],
)
def test_labels_become_train_ids(tmp_path, name, split, expected):
    MAKE[name](tmp_path)
    for row in rows_of(sources_of(name, tmp_path, split)):
        np.testing.assert_array_equal(row["label"], expected)
        counts = np.bincount(expected.ravel(), minlength=256)[:19]
        assert row["pixel_counts"] == counts.tolist()


def test_synthia_takes_its_classes_from_the_first_channel(tmp_path):
    make_synthia(tmp_path)
    # The list of classes that comes with SYNTHIA-RAND-CITYSCAPES, ids 0 to 22.
    names = [
        None, "sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car",
        "traffic sign", "person", "bicycle", "motorcycle", None, None, "traffic light", "terrain",
        "rider", "truck", "bus", "train", "wall", None,
    ]  # fmt: skip
    for taxonomy in (CITYSCAPES_19, CITYSCAPES_16, CITYSCAPES_13):
        ids = [taxonomy.names.index(n) if n in taxonomy.names else 255 for n in names]
        for row in rows_of(sources_of("synthia", tmp_path), taxonomy):
            np.testing.assert_array_equal(row["label"], np.resize(ids, SIZE))


def test_the_label_id_tables_are_the_published_ones():
    table = CITYSCAPES_19.train_id_table(DATASETS["cityscapes"].coding.ids)
    np.testing.assert_array_equal(table, GOLDEN["cs_id2train"])
    table = CITYSCAPES_19.train_id_table(DATASETS["gtav"].coding.ids)
    np.testing.assert_array_equal(table, GOLDEN["gta_id2train"])
    assert CITYSCAPES_19.names == tuple(GOLDEN["classes"])
    np.testing.assert_array_equal(CITYSCAPES_19.colors, GOLDEN["palette"])
    ids = DATASETS["cityscapes"].coding.ids
    assert [ids[name] for name in CITYSCAPES_19.names] == GOLDEN["train2id"].tolist()


def test_fewer_classes_keep_their_order_and_leave_the_others_unlabelled(tmp_path):
    assert CITYSCAPES_16.num_classes == 16 and CITYSCAPES_13.num_classes == 13
    left_out = set(CITYSCAPES_19.names) - set(CITYSCAPES_16.names)
    assert left_out == {"terrain", "truck", "train"}
    assert set(CITYSCAPES_16.names) - set(CITYSCAPES_13.names) == {"wall", "fence", "pole"}
    make_acdc(tmp_path)
    taxonomy = read_taxonomy(tmp_path, DATASETS["acdc"], "cityscapes16")
    label = rows_of(sources_of("acdc", tmp_path), taxonomy)[0]["label"]
    for train_id, name in enumerate(CITYSCAPES_19.names):
        kept = taxonomy.names.index(name) if name in taxonomy.names else 255
        assert (label[train_id == TRAIN_IDS] == kept).all()


def test_a_night_image_comes_with_the_day_image_of_its_csv_line(tmp_path):
    make_dark_zurich(tmp_path)
    day = tmp_path / "rgb_anon/train/day/GOPR0345"
    expected = [day / f"GOPR0345_frame_0000{n}_rgb_anon.png" for n in ("10", "09")]
    sources = sources_of("dark_zurich", tmp_path, labels=False)
    assert [source.reference for source in sources] == expected
    rows = rows_of(sources)
    assert [row["reference"] for row in rows] == [path.read_bytes() for path in expected]
    for row, path in zip(rows_of(sources, size=(6, 10)), expected, strict=True):
        assert pixels(row["image"]).shape == pixels(row["reference"]).shape == (6, 10, 3)
        reference = Source("day", path)
        assert row["reference"] == rows_of([reference], size=(6, 10))[0]["image"]


def test_a_folder_of_one_s_own_pairs_references_by_their_stem(tmp_path):
    for name in ("a.jpg", "b.png"):
        write_image(tmp_path / "images" / name)
    sources = sources_of("folder", tmp_path, labels=False)
    assert [source.reference for source in sources] == [None, None]
    write_image(tmp_path / "references/a.png", 1)
    with pytest.raises(ValueError, match=f"1 images have no .* {tmp_path}/references, first 'b'"):
        sources_of("folder", tmp_path, labels=False)
    write_image(tmp_path / "references/b.jpg", 2)
    expected = [tmp_path / "references/a.png", tmp_path / "references/b.jpg"]
    sources = sources_of("folder", tmp_path, labels=False)
    assert [source.reference for source in sources] == expected


def test_a_reference_of_another_size_is_refused(tmp_path):
    make_dark_zurich(tmp_path)
    path = tmp_path / "rgb_anon/train/day/GOPR0345/GOPR0345_frame_000010_rgb_anon.png"
    Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(ValueError, match=f"{path} is 4x4 but its image .* is 20x12"):
        rows_of(sources_of("dark_zurich", tmp_path, labels=False))


def test_the_two_gtav_labels_of_another_size_are_scaled_to_their_images(tmp_path):
    make_gtav(tmp_path)
    write_image(tmp_path / "images/15188.png")
    write_palette(tmp_path / "labels/15188.png", np.kron(LABEL_IDS, np.ones((2, 2), np.uint8)))
    row = {row["key"]: row for row in rows_of(sources_of("gtav", tmp_path))}["15188"]
    np.testing.assert_array_equal(row["label"], GOLDEN["gta_id2train"][LABEL_IDS])
    write_palette(tmp_path / "labels/00001.png", LABEL_IDS[:6])
    with pytest.raises(ValueError, match=r"labels/00001.png is 20x6 but its image .* is 20x12"):
        rows_of(sources_of("gtav", tmp_path))


def test_a_label_of_another_format_is_refused(tmp_path):
    make_gtav(tmp_path)
    make_synthia(tmp_path)
    label = tmp_path / "labels/00001.png"
    Image.new("RGB", SIZE[::-1]).save(label)
    with pytest.raises(ValueError, match=r"labels/00001.png is no 8-bit palette PNG"):
        read_label(label, CITYSCAPES_19, DATASETS["gtav"].coding)
    with pytest.raises(ValueError, match=r"labels/00001.png is no 16-bit PNG"):
        read_label(label, CITYSCAPES_19, DATASETS["synthia"].coding)
    write_16_bit(label, np.full((*SIZE, 3), 256, np.uint16))
    with pytest.raises(ValueError, match=r"holds the value 256: label ids are 0\.\.255"):
        read_label(label, CITYSCAPES_19, DATASETS["synthia"].coding)


@pytest.mark.parametrize("size", [None, (6, 10)])
@pytest.mark.parametrize("folder", ["images", "references"])
def test_a_16_bit_image_is_refused(make_folder, tmp_path, folder, size):
    root = make_folder(tmp_path / "data", count=2, size=(16, 24))
    shutil.copytree(root / "images", root / "references", dirs_exist_ok=True)
    (root / folder / "frame001.jpg").unlink()
    write_16_bit(root / folder / "frame001.png", np.full((16, 24, 3), 30000, np.uint16))
    with pytest.raises(ValueError, match=rf"{folder}/frame001.png is a 16-bit PNG: convert it to"):
        rows_of(sources_of("folder", root), size=size)


def test_sub_folders_of_a_folder_of_one_s_own_are_followed(make_folder, tmp_path):
    root = make_folder(tmp_path / "data", count=2)
    for kind, suffix in (("images", "jpg"), ("labels", "png")):
        (root / kind / "tram").mkdir()
        (root / f"{kind}/frame001.{suffix}").rename(root / f"{kind}/tram/frame001.{suffix}")
    sources = sources_of("folder", root)
    assert [source.label for source in sources] == [
        root / "labels/frame000.png", root / "labels/tram/frame001.png"
    ]  # fmt: skip


# What is taken away from a tree, and what the message then names.
MISSING = [
    ("gtav", "images", "no folder {}/images: .*download.visinf.tu-darmstadt.de"),
    ("gtav", "labels", "no folder {}/labels: .*NN_labels.zip"),
    ("gtav", "labels/00002.png", "1 images have no label, first {}/labels/00002.png: "),
    ("synthia", "GT/LABELS", "no folder {}/GT/LABELS: .*SYNTHIA-RAND-CITYSCAPES"),
    ("cityscapes", "leftImg8bit/train", "no folder {}/leftImg8bit/train: .*leftImg8bit_trainval"),
    ("cityscapes", "gtFine", "no folder {}/gtFine/train: .*gtFine_trainvaltest.zip.*cityscapes-d"),
    ("cityscapes", "gtFine/train/zurich", "first {}/gtFine/train/zurich/zurich_000000_000019_gtF"),
    ("dark_zurich", "corresp", "no folder {}/corresp/train/night: .*Dark_Zurich_train_anon.zip"),
    ("dark_zurich", "corresp/train/night/GP010352", "no CSV .* pairs 'train/night/GP010352/GP0103"),
    ("dark_zurich", "rgb_anon/train/day", "has no reference {}/rgb_anon/train/day/GOPR0345/GOPR0"),
    ("nighttime_driving", "gtCoarse_daytime_trainvaltest", "no folder .*NighttimeDrivingTest.zip"),
    ("bdd100k_night", "gt_trainval_night_correct_filenames.txt", "no file {}/gt_trainval.*MGCDA"),
    ("bdd100k_night", "images/10k/val", "no folder {}/images/10k/val: .*10K Images"),
    ("bdd100k_night", "images/10k/val/81d5165d-fcfc6c67.jpg", "lists '81d5165d-fcfc6c67', which"),
    ("acdc", "rgb_anon/snow", "no folder {}/rgb_anon/snow/train: .*rgb_anon_trainvaltest.zip"),
    ("acdc", "gt/rain", "no folder {}/gt/rain/train: .*gt_trainval.zip"),
]


@pytest.mark.parametrize(("name", "part", "message"), MISSING)
def test_a_missing_part_is_named_with_where_it_is_had_from(tmp_path, name, part, message):
    MAKE[name](tmp_path / "root")
    path = tmp_path / "root" / part
    path.rename(tmp_path / "elsewhere")
    labels = name != "dark_zurich"
    config = IngestConfig(
        root=str(tmp_path / "root"), to=str(tmp_path / "out"), dataset=name, labels=labels
    )
    with pytest.raises(ValueError, match=message.format(tmp_path / "root")):
        check(config)
    assert not (tmp_path / "out").exists()


def _refused(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(pytest.fail, IngestConfig, check=check, arguments=["--to", "unused", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_wrong_name_lists_the_right_ones(tmp_path, capsys):
    make_cityscapes(tmp_path)
    root = ["--root", str(tmp_path)]
    error = _refused(capsys, *root, "--dataset", "kitti")
    assert all(name in error for name in DATASETS)
    error = _refused(capsys, *root, "--dataset", "cityscapes", "--split", "trainval")
    assert "no split 'trainval': the data set has train, val, test" in error
    error = _refused(capsys, *root, "--dataset", "cityscapes", "--split", "test")
    assert "split test has no public labels: store none with --labels false" in error
    error = _refused(capsys, *root, "--dataset", "cityscapes", "--classes", "cityscapes20")
    assert "no class file at cityscapes20: " in error and "cityscapes19, cityscapes16" in error


def test_classes_that_the_data_set_does_not_have_are_refused(make_folder, tmp_path):
    root = make_folder(tmp_path, count=1)
    with pytest.raises(ValueError, match=r"classes.json has the class 'class0', .* are: road, "):
        read_taxonomy(root, DATASETS["gtav"], str(root / "classes.json"))


def test_two_references_of_one_image_are_refused(tmp_path):
    make_dark_zurich(tmp_path)
    path = tmp_path / "corresp/train/night/other.csv"
    path.write_text("train/night/GOPR0351/GOPR0351_frame_000071,train/day/GOPR0345/other\n")
    with pytest.raises(ValueError, match=r"'train/night/GOPR0351/.*' has no reference, or two"):
        sources_of("dark_zurich", tmp_path, labels=False)


def test_dark_zurich_is_ingested_with_its_references(ray_cluster, tmp_path):
    root, to = tmp_path / "root", tmp_path / "out"
    make_dark_zurich(root)
    config = IngestConfig(
        root=str(root), to=str(to), dataset="dark_zurich", labels=False, shard_bytes=1
    )
    manifest = ingest(config)
    assert manifest.options["dataset"] == "dark_zurich" and manifest.options["split"] == "train"
    assert manifest.taxonomy == CITYSCAPES_19 and not manifest.labelled
    day = root / "rgb_anon/train/day/GOPR0345"
    expected = {
        "GOPR0351_frame_000071": day / "GOPR0345_frame_000010_rgb_anon.png",
        "GP010352_frame_000001": day / "GOPR0345_frame_000009_rgb_anon.png",
    }
    found = {}
    for path in sorted(to.glob("shard-*.arrow")):
        for row in pa.ipc.open_file(path.read_bytes()).read_all().to_pylist():
            found[row["key"]] = row["reference"]
    assert found == {key: path.read_bytes() for key, path in expected.items()}
    assert manifest.pixel_counts.shape == (2, 19) and not manifest.pixel_counts.any()
