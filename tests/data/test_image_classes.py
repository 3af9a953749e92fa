"""Pictures with a class: labels that are none, hidden files, copies in two parts, equal names, and what is drawn."""

import datasets
import pytest

from tests.zoo.tiny import picture
from vlm_mech.data.class_names import check_names, unique_names
from vlm_mech.data.image_classes import from_splits, load_classes
from vlm_mech.data.picture_splits import Labelled, deal
from vlm_mech.data.scenes import SPLITS
from vlm_mech.data.shared_pictures import pixel_hash
from vlm_mech.errors import UsageError

ALL = {"train": None, "validation": None, "test": None}
NAMES = ["ant", "bee", "cat"]


def split(labels, *, first=0):
    """Rows with these labels, each with a picture of its own."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    images = [picture(first + number) for number in range(len(labels))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def folder_of(path, shown, *, kind="png"):
    """Picture files by the path from the folder."""
    for name, number in shown.items():
        target = path / f"{name}.{kind}"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(target)
    return path


def pixels(data):
    return {part: [pixel_hash(each.image) for each in getattr(data, part)] for part in SPLITS}


def assert_nothing_shared(data):
    shown = pixels(data)
    assert all(not set(shown[one]) & set(shown[other]) for one in SPLITS for other in SPLITS if one != other)


# Labels


def test_rows_without_a_label_are_counted_out():
    """-1 is the hub's sign for no label; as a Python index it is the last class."""
    test = split([0, -1, 1, 2, -1, None], first=50)
    data = from_splits("hf:a/b", {"train": split([0, 1, 2] * 4), "test": test}, ALL, seed=0)
    assert sorted((each.id, each.label) for each in data.test) == [
        ("test 0", "ant"),
        ("test 2", "bee"),
        ("test 3", "cat"),
    ]
    told = {each.id: each.reason for each in data.refused}
    assert set(told) == {"test 1", "test 4", "test 5"}
    assert told["test 1"] == "its label is -1, which is no class; 0 to 2 are"
    assert told["test 5"].startswith("its label is None" if test[5]["label"] is None else "its label is -1")


def test_a_test_split_without_any_label_is_no_test_split():
    made = {"train": split([0, 1, 2] * 6), "validation": split([0, 1, 2], first=30), "test": split([-1] * 4, first=50)}
    data = from_splits("hf:a/b", made, ALL, seed=0)
    assert {each.id.split()[0] for each in data.test} == {"train"} and {each.label for each in data.test} == set(NAMES)
    assert [each.id for each in data.refused] == [f"test {number}" for number in range(4)]
    assert data.notes == ("test: dealt out of the training split with seed 0",)
    with pytest.raises(UsageError, match="no row of the train split of 'x' has a label"):
        from_splits("x", {"train": split([-1, -1])}, ALL, seed=0)


def test_classes_of_the_hub_are_in_their_own_order():
    data = from_splits("hf:a/b", {"train": split([2, 2, 2, 0, 0, 0, 1, 1, 1])}, ALL, seed=0)
    assert data.names == ("ant", "bee", "cat")


# Names


def test_names_that_are_the_same_words_get_their_number(tmp_path):
    assert unique_names(["crane", "wren", "Crane_", "..."]) == ["crane (0)", "wren", "Crane_ (2)", "..."]
    check_names(unique_names(["crane", "wren", "crane"]))
    folder = folder_of(tmp_path / "birds", {f"n{n % 3}/{n}": n for n in range(9)})
    (tmp_path / "names.csv").write_text("n0,crane\nn1,wren\nn2,crane\n")
    data = load_classes(str(folder), names=tmp_path / "names.csv")
    assert data.names == ("crane (0)", "wren", "crane (2)")
    (tmp_path / "names.csv").write_text("n0,great white shark, white shark\nn1,wren\nn2,crane\n")
    with pytest.raises(UsageError, match="line 1 is 'n0,great white shark,white shark'; folder,name is needed"):
        load_classes(str(folder), names=tmp_path / "names.csv")
    (tmp_path / "names.csv").write_text("n0,crane\nn1,wren\nn0,jay\nn2,crane\n")
    with pytest.raises(UsageError, match="lines 1 and 3 are both about 'n0'"):
        load_classes(str(folder), names=tmp_path / "names.csv")
    assert {each.label for each in data.test} == set(data.names)
    assert data.notes[-1] == "classes of one name are numbered: crane (0), crane (2)"


# Hidden files


def test_hidden_files_and_folders_are_no_pictures_at_any_depth(tmp_path):
    shown = {f"{name}/{n}": 10 * at + n for at, name in enumerate(("a", "b")) for n in range(3)}
    hidden = {"a/.ipynb_checkpoints/0-checkpoint": 0, "a/more/.cache/1": 1, "b/.x": 50, "b/._0": 51, ".git/3": 52}
    data = load_classes(str(folder_of(tmp_path, shown | hidden | {"a/more/9": 9})))
    ids = {each.id for part in SPLITS for each in getattr(data, part)}
    assert ids == {f"{name}.png" for name in (*shown, "a/more/9")} and data.names == ("a", "b")


# Parts


def test_a_class_of_three_pictures_has_one_in_every_part():
    for n in range(3, 12):
        parts, _ = deal([Labelled(f"{n}", picture(n), "a") for n in range(n)], seed=0)
        assert all(parts.values()) and sum(map(len, parts.values())) == n
    with pytest.raises(UsageError, match=r"'a' has 2 image\(s\) that differ and can be used; at least 3"):
        deal([Labelled(f"{n}", picture(n % 2), "a") for n in range(6)], seed=0)


@pytest.mark.parametrize("seed", range(4))
def test_copies_of_a_picture_are_dealt_into_one_part(tmp_path, seed):
    """Of each class every picture is there twice, once as another kind of file; one is in both classes, so of none."""
    shown = {f"{name}/{n}": 10 * at + n for at, name in enumerate(("a", "b")) for n in range(5)}
    folder_of(tmp_path, shown)
    folder_of(tmp_path, shown | {"b/shared": 3}, kind="bmp")
    data = load_classes(str(tmp_path), seed=seed)
    assert_nothing_shared(data)
    assert sum(len(each) for each in pixels(data).values()) == 18
    assert {each.id for each in data.refused} == {"a/3.png", "a/3.bmp", "b/shared.bmp"}
    assert data.refused[-1].reason.startswith("it has the pixels of a/3.")
    assert data.refused[-1].reason.endswith(", which is of class 'a'")


def test_a_copy_in_another_given_part_is_counted_out(tmp_path):
    shown = {"train/a/0": 0, "train/a/1": 1, "train/b/2": 2, "val/a/3": 3, "val/b/4": 4, "test/a/5": 5, "test/b/6": 6}
    copies = {"train/a/one": 5, "val/b/two": 6, "train/b/three": 4}
    data = load_classes(str(folder_of(tmp_path, shown | copies)))
    assert_nothing_shared(data)
    assert [len(each) for each in pixels(data).values()] == [3, 2, 2]
    assert {each.id: each.reason for each in data.refused} == {
        "a/one.png": "in train: it has the pixels of a/5.png in test",
        "b/two.png": "in validation: it has the pixels of b/6.png in test",
        "b/three.png": "in train: it has the pixels of b/4.png in validation",
    }


def test_copies_are_no_evidence(tmp_path):
    """Classes at random: with copies in both parts, who has seen the picture knows its class."""
    shown = {f"{'abcd'[n % 4]}/{n}": n for n in range(20)}
    folder_of(tmp_path, shown)
    folder_of(tmp_path, {f"{name[0]}/.ipynb_checkpoints/{name[2:]}": n for name, n in shown.items()})
    folder_of(tmp_path, {f"{name} again": n for name, n in shown.items()})
    data = load_classes(str(tmp_path))
    known = {pixel_hash(each.image): each.label for each in data.train}
    assert not any(pixel_hash(each.image) in known for each in data.test) and len(data.test) == 8


def test_fewer_pictures_are_drawn_with_the_seed_and_it_is_told(tmp_path):
    folder_of(tmp_path, {f"{'ab'[n % 2]}/{n:02d}": n for n in range(40)})
    drawn = [load_classes(str(tmp_path), n=2, n_train=4, seed=seed) for seed in range(4)]
    assert len({tuple(each.id for each in data.test) for data in drawn}) > 1
    assert drawn[1].notes == (
        "parts dealt out with seed 1", "train: 4 of 24 images, drawn with seed 1, classes in turn",
        "test: 2 of 8 images, drawn with seed 1, classes in turn",
    )  # fmt: skip
    assert load_classes("scenes/kinds", n=16, n_train=16, n_validation=16).notes == ()
    assert load_classes(str(tmp_path), n=8, n_train=30).notes[1:] == (
        "requested 30 train pictures, the source holds 24",
    )


GIVEN = {f"{part}/{name}/{n}": 20 * p + 10 * c + n for p, part in enumerate(("train", "val", "test"))
         for c, name in enumerate(("cat", "dog")) for n in range(3)}  # fmt: skip


@pytest.mark.parametrize("called", [("Train", "Val", "Test"), ("TRAINING", "dev", "test"), ("train", "Valid", "TEST")])
def test_parts_may_be_written_in_any_case(tmp_path, called):
    """They were taken for three classes."""
    new = dict(zip(("train", "val", "test"), called, strict=True))
    folder_of(tmp_path, {new[name.partition("/")[0]] + "/" + name.partition("/")[2]: n for name, n in GIVEN.items()})
    data = load_classes(str(tmp_path))
    assert data.names == ("cat", "dog") and [len(getattr(data, part)) for part in SPLITS] == [6, 6, 6]


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        ({name: n for name, n in GIVEN.items() if "train" not in name}, "the parts 'val', 'test', none for train"),
        ({name: n for name, n in GIVEN.items() if "val" not in name}, "'train', 'test', none for validation"),
        (GIVEN | {"valid/cat/0": 99}, "'train', 'val', 'valid', 'test', two for validation"),
        ({f"images/{name[6:]}": n for name, n in GIVEN.items() if "train" in name} | {"annotations/0": 99},
         "images' holds no image itself, only in cat, dog; needed is a folder a class"),
    ],
    ids=["no train", "no validation", "twice", "nested"],
)  # fmt: skip
def test_folders_of_parts_are_no_classes(tmp_path, shown, told):
    with pytest.raises(UsageError, match=told):
        load_classes(str(folder_of(tmp_path, shown)))


def test_a_class_may_be_called_train(tmp_path):
    data = load_classes(
        str(folder_of(tmp_path, {f"{name}/{n}": 9 * len(name) + n for name in ("train", "car") for n in range(4)}))
    )
    assert data.names == ("car", "train")


@pytest.mark.parametrize("seed", range(3))
def test_only_pictures_that_can_be_read_are_dealt_out(tmp_path, seed):
    """Of three pictures of a cat two were broken, and no part but one had a cat."""
    folder_of(tmp_path, {f"{name}/{n}": 9 * len(name) + n for name in ("a", "bb") for n in range(5)})
    for n in range(2):
        (tmp_path / "a" / f"{n}.png").write_text("no picture")
    data = load_classes(str(tmp_path), seed=seed)
    assert all({each.label for each in getattr(data, part)} == {"a", "bb"} for part in SPLITS)
    assert [each.id for each in data.refused] == ["a/0.png", "a/1.png"]
    (tmp_path / "a" / "2.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"'a' has 2 image\(s\) that differ and can be used"):
        load_classes(str(tmp_path), seed=seed)


def test_a_class_without_a_usable_picture_in_a_part_is_told(tmp_path):
    folder_of(tmp_path, GIVEN)
    for n in range(3):
        (tmp_path / "val" / "dog" / f"{n}.png").write_text("no picture")
    assert load_classes(str(tmp_path)).notes == ("validation: no image of dog can be used",)
    for n in range(3):
        (tmp_path / "test" / "dog" / f"{n}.png").write_text("no picture")
    with pytest.raises(UsageError, match="no image of class 'dog' in the test part"):
        load_classes(str(tmp_path))


def test_a_picture_in_two_classes_is_of_none(tmp_path):
    """A class that is a link to another had all its pictures under both names."""
    data = load_classes(str(folder_of(tmp_path / "given", GIVEN | {"test/dog/cat": 40, "train/cat/odd": 30})))
    assert {each.id for each in data.refused} == {"cat/0.png", "dog/cat.png", "cat/odd.png", "dog/0.png"}
    assert len(data.test) == 5
    folder_of(tmp_path / "dealt", {f"{name}/{n}": 9 * len(name) + n for name in ("a", "bb") for n in range(4)})
    (tmp_path / "dealt" / "c").symlink_to(tmp_path / "dealt" / "bb")
    with pytest.raises(UsageError, match="'bb' has 0 image.*bb/0.png, it has the pixels of c/0.png"):
        load_classes(str(tmp_path / "dealt"))


def test_no_picture_is_left_out_in_silence(tmp_path):
    """Of some endings, which Pillow reads, no file was read; what it does not read is counted."""
    folder_of(tmp_path, {f"{name}/{n}": 9 * len(name) + n for name in ("a", "bb") for n in range(4)})
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "0.png.keep")
    for target, kind in (("a/0.jfif", "JPEG"), ("bb/9.ppm", "PPM"), ("stray.png", "PNG")):
        picture(77 + len(target)).save(tmp_path / target, kind)
    for name in ("a/5.heic", "a/6.svg", "a/notes.txt"):
        (tmp_path / name).write_text("?")
    data = load_classes(str(tmp_path))
    used = {each.id for part in SPLITS for each in getattr(data, part)}
    assert {"a/0.jfif", "bb/9.ppm"} <= used and len(used) == 9
    assert {each.id for each in data.refused} == {"stray.png", "a/5.heic", "a/6.svg"}
