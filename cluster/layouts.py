"""The layouts that `--dataset` knows: each as its authors' archives unpack, nothing moved.

gtav               images/00001.png, labels/00001.png: palette PNG, the index is a Cityscapes
                   label id. All 24,966 images are the training set, as in every adaptation
                   benchmark.
synthia            RGB/0000000.png, GT/LABELS/0000000.png: 16-bit PNG, the class in the first
                   channel, the instance in the next.
cityscapes         leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and
                   gtFine/SPLIT/CITY/*_gtFine_labelIds.png, 8-bit label ids.
dark_zurich        rgb_anon/SPLIT/night/SEQUENCE/*_rgb_anon.png,
                   gt/val/night/SEQUENCE/*_gt_labelTrainIds.png, and for the training images
                   the day image of the same place by the CSV files below corresp/train/night:
                   lines `train/night/SEQ/FRAME,train/day/SEQ/FRAME`, paths below rgb_anon
                   without _rgb_anon.png. It becomes the column `reference` of the shards.
nighttime_driving  leftImg8bit/test/night/*_leftImg8bit.png and
                   gtCoarse_daytime_trainvaltest/test/night/*_gtCoarse_labelTrainIds.png.
bdd100k_night      images/10k/{train,val}/ID.jpg, labels/sem_seg/masks/{train,val}/ID.png, and
                   the list of the 87 night images with correct labels; it holds lines such as
                   seg/labels/train/ID_train_id.png, of which the ID counts.
acdc               rgb_anon/CONDITION/SPLIT/SEQUENCE/*_rgb_anon.png and
                   gt/CONDITION/SPLIT/SEQUENCE/*_gt_labelTrainIds.png, for fog, night, rain
                   and snow together; a --list chooses among them.
folder             images/STEM.jpg or .png, labels/STEM.png: 8-bit train ids, and classes.json.
                   If there is a folder references, references/STEM.jpg or .png: the day images
                   of the same places.
"""

from __future__ import annotations

from cluster.datasets import Dataset
from cluster.sources import LabelCoding
from sepico.taxonomies import CITYSCAPES_LABEL_IDS, CITYSCAPES_TRAIN_IDS, SYNTHIA_LABEL_IDS

_TRAIN_IDS = LabelCoding("8-bit grayscale", CITYSCAPES_TRAIN_IDS)

DATASETS = {
    "folder": Dataset(
        images="images",
        image_suffixes=(".jpg", ".jpeg", ".png"),
        labels="labels",
        label_suffix=".png",
        splits={"all": ("",)},
        home="--root must hold images/ and labels/",
        classes=None,
        references="references",
    ),
    "gtav": Dataset(
        images="images",
        image_suffixes=(".png",),
        labels="labels",
        label_suffix=".png",
        splits={"train": ("",)},
        home="unpack NN_images.zip and NN_labels.zip, NN = 01 to 10, of Playing for Data, "
        "https://download.visinf.tu-darmstadt.de/data/from_games/",
        coding=LabelCoding("8-bit palette", CITYSCAPES_LABEL_IDS),
        rescaled=frozenset({"15188", "17705"}),
    ),
    "synthia": Dataset(
        images="RGB",
        image_suffixes=(".png",),
        labels="GT/LABELS",
        label_suffix=".png",
        splits={"train": ("",)},
        home="unpack SYNTHIA-RAND-CITYSCAPES, https://synthia-dataset.net/downloads/, and name "
        "its folder RAND_CITYSCAPES as --root",
        coding=LabelCoding("16-bit", SYNTHIA_LABEL_IDS),
    ),
    "cityscapes": Dataset(
        images="leftImg8bit",
        image_suffixes=("_leftImg8bit.png",),
        labels="gtFine",
        label_suffix="_gtFine_labelIds.png",
        splits={split: (split,) for split in ("train", "val", "test")},
        home="unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, "
        "https://www.cityscapes-dataset.com/downloads/",
        coding=LabelCoding("8-bit grayscale", CITYSCAPES_LABEL_IDS),
        unlabelled=frozenset({"test"}),  # its label files are blank
    ),
    "dark_zurich": Dataset(
        images="rgb_anon",
        image_suffixes=("_rgb_anon.png",),
        labels="gt",
        label_suffix="_gt_labelTrainIds.png",
        splits={split: (f"{split}/night",) for split in ("train", "val", "test")},
        home="unpack Dark_Zurich_train_anon.zip (with corresp/), Dark_Zurich_val_anon.zip and "
        "Dark_Zurich_test_anon_withoutGt.zip into one folder, "
        "https://www.trace.ethz.ch/publications/2019/GCMA_UIoU/",
        coding=_TRAIN_IDS,
        unlabelled=frozenset({"train", "test"}),
        correspondences={"train": "corresp/train/night"},
    ),
    "nighttime_driving": Dataset(
        images="leftImg8bit",
        image_suffixes=("_leftImg8bit.png",),
        labels="gtCoarse_daytime_trainvaltest",
        label_suffix="_gtCoarse_labelTrainIds.png",
        splits={"test": ("test/night",)},
        home="unpack NighttimeDrivingTest.zip, http://people.ee.ethz.ch/~daid/NightDriving/",
        coding=_TRAIN_IDS,
    ),
    "bdd100k_night": Dataset(
        images="images/10k",
        image_suffixes=(".jpg",),
        labels="labels/sem_seg/masks",
        label_suffix=".png",
        splits={"test": ("train", "val")},
        home="unpack '10K Images' and 'Segmentation' of BDD100K, https://bdd-data.berkeley.edu, "
        "and put gt_trainval_night_correct_filenames.txt beside images/, from "
        "https://github.com/sakaridis/MGCDA, folder data/bdd100k_lists_file_names",
        coding=_TRAIN_IDS,
        subset="gt_trainval_night_correct_filenames.txt",
    ),
    "acdc": Dataset(
        images="rgb_anon",
        image_suffixes=("_rgb_anon.png",),
        labels="gt",
        label_suffix="_gt_labelTrainIds.png",
        splits={
            split: tuple(f"{condition}/{split}" for condition in ("fog", "night", "rain", "snow"))
            for split in ("train", "val", "test")
        },
        home="unpack rgb_anon_trainvaltest.zip and gt_trainval.zip, "
        "https://acdc.vision.ee.ethz.ch/download",
        coding=_TRAIN_IDS,
        unlabelled=frozenset({"test"}),
    ),
}


def find_dataset(name: str) -> Dataset:
    """Raises ValueError that lists the names."""
    if name not in DATASETS:
        raise ValueError(f"dataset {name!r} is none of {', '.join(DATASETS)}")
    return DATASETS[name]
