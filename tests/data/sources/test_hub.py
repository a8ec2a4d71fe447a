import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data import kept_indexes, rows
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError

GREY = [np.random.default_rng(i).integers(0, 256, (4, 6), dtype=np.uint8) for i in range(6)]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
    library = pytest.importorskip("datasets")
    patch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    library.disable_progress_bars()
    yield library
    patch.undo()


def table(datasets, arrays=GREY, **columns):
    """A data set of images, with the further columns given as (values, feature)."""
    features = {"number": datasets.Value("int32"), "picture": datasets.Image()}
    features |= {name: feature for name, (_, feature) in columns.items()}
    rows = {"number": range(len(arrays)), "picture": [Image.fromarray(a) for a in arrays]}
    rows |= {name: values for name, (values, _) in columns.items()}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def file_of(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


def labelled(datasets):
    kinds = datasets.ClassLabel(names=["cat", "dog", "eel"])
    return table(datasets, kind=([2, 0, 1, 1, 0, 2], kinds))


def test_images_and_labels_are_found_by_their_types(datasets, tmp_path):
    labelled(datasets).save_to_disk(tmp_path / "saved")
    data = open_data(f"hf:{tmp_path / 'saved'}")
    np.testing.assert_array_equal(data.array()[:, 0], GREY)
    assert data.labels.tolist() == [2, 0, 1, 1, 0, 2]
    assert data.class_names == ("cat", "dog", "eel")
    assert data.name == f"hf:{tmp_path / 'saved'}"


def test_without_class_labels_there_are_no_labels(datasets, tmp_path):
    table(datasets).save_to_disk(tmp_path / "saved")
    assert open_data(f"hf:{tmp_path / 'saved'}").labels is None


def test_parquet_files_and_slices_are_read(datasets, tmp_path):
    (tmp_path / "set").mkdir()
    labelled(datasets).to_parquet(tmp_path / "set" / "train-0.parquet")
    np.testing.assert_array_equal(open_data(f"hf:{tmp_path / 'set'}").array()[:, 0], GREY)
    part = open_data(f"hf:{tmp_path / 'set'}:train[:2]")
    np.testing.assert_array_equal(part.array()[:, 0], GREY[:2])
    assert part.labels.tolist() == [2, 0]
    assert part.num_classes == 3


def test_a_folder_of_images_is_read_as_the_library_does(datasets, tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / "set" / "train" / kind).mkdir(parents=True)
        Image.fromarray(GREY[0]).save(tmp_path / "set" / "train" / kind / "0.png")
    data = open_data(f"hf:{tmp_path / 'set'}")
    np.testing.assert_array_equal(data.array()[:, 0], [GREY[0]] * 2)
    assert (data.labels.tolist(), data.class_names) == ([0, 1], ("cat", "dog"))


def test_splits_are_chosen_and_listed(datasets, tmp_path):
    both = {"train": labelled(datasets), "test": labelled(datasets).select([5, 4])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    assert len(open_data(f"hf:{tmp_path / 'saved'}")) == 6
    assert open_data(f"hf:{tmp_path / 'saved'}:test").labels.tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"saved:valid: cannot be loaded \(no split 'valid' among train, test\)"):
        open_data(f"hf:{tmp_path / 'saved'}:valid")
    labelled(datasets).save_to_disk(tmp_path / "one")
    assert len(open_data(f"hf:{tmp_path / 'one'}:train")) == 6
    with pytest.raises(ValueError, match=r"no split 'test' among train"):
        open_data(f"hf:{tmp_path / 'one'}:test")


def test_sizes_are_brought_to_one_as_those_of_folders(datasets, tmp_path):
    table(datasets, [*GREY, GREY[0][:3]]).save_to_disk(tmp_path / "saved")
    source = f"hf:{tmp_path / 'saved'}"
    with pytest.raises(ValueError, match=r"row 0 is 4x6 but row 6 is 3x6 .*--size H W --fit crop"):
        open_data(source)
    assert open_data(source, size=(2, 3), fit="resize").array().shape == (7, 1, 2, 3)
    assert open_data(source, size=(8, 8), fit="pad").content is None
    table(datasets).save_to_disk(tmp_path / "equal")
    assert open_data(f"hf:{tmp_path / 'equal'}", size=(8, 8), fit="pad").content == (4, 6)


def test_rows_without_an_image_are_named_and_can_be_skipped(datasets, tmp_path):
    rows = labelled(datasets)
    features = rows.features
    broken = datasets.Dataset.from_list(
        [{**row, "picture": None if i == 1 else row["picture"]} for i, row in enumerate(rows)], features=features
    )
    broken.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"row 1 cannot be read \(no image\).*--skip-bad"):
        open_data(f"hf:{tmp_path / 'saved'}")
    told = []
    with pytest.warns(UserWarning, match="skipped 1 of 6"):
        data = open_data(f"hf:{tmp_path / 'saved'}", skip_bad=True, progress=lambda done, of: told.append((done, of)))
    assert data.labels.tolist() == [2, 1, 1, 0, 2]
    assert told == [(6, 6)]


def test_of_several_columns_the_first_is_used_and_said(datasets, tmp_path):
    kinds = datasets.ClassLabel(names=["cat", "dog"])
    table(datasets, coarse=([0] * 6, kinds), fine=([1] * 6, kinds)).save_to_disk(tmp_path / "saved")
    with pytest.warns(UserWarning, match="the first of the ClassLabel columns coarse, fine is used"):
        assert not open_data(f"hf:{tmp_path / 'saved'}").labels.any()


def test_a_table_without_images_is_refused(datasets, tmp_path):
    labelled(datasets).remove_columns("picture").save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"6 rows of number, kind; needs images \(a column of type Image\)"):
        open_data(f"hf:{tmp_path / 'saved'}")


def test_missing_folders_are_an_error_without_a_look_at_the_network(tmp_path):
    for source in ("hf", "hf:./nowhere", f"hf:{tmp_path / 'nowhere'}:train"):
        with pytest.raises(ValueError, match=r"no such folder; give hf:FOLDER\[:SPLIT\] or hf:OWNER/NAME\[:SPLIT\]"):
            open_data(source)


def test_a_hub_that_is_out_of_reach_is_one_clear_line(datasets, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"^hf:owner/name: cannot be loaded \(.*\); check name, split and network"
    ) as caught:
        open_data("hf:owner/name")
    assert "\n" not in str(caught.value)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data\.source='hf:owner/name' needs datasets: pip install .*\[data\]"):
        open_data("hf:owner/name")


def test_float_images_are_never_black(datasets, tmp_path):
    """The library stores arrays of floats as TIFF files."""
    shutil.copytree(Path(__file__).parents[1] / "cases" / "hf_float01", tmp_path / "floats")
    message = r"floats: row 0 cannot be read \(its pixels are floating-point numbers of unknown range; convert them"
    with pytest.raises(ValueError, match=message):
        open_data(f"hf:{tmp_path / 'floats'}")
    table(datasets, [np.arange(24, dtype=np.int32).reshape(4, 6)] * 2).save_to_disk(tmp_path / "integers")
    with pytest.raises(ValueError, match=r"row 0 cannot be read .*32-bit integers"):
        open_data(f"hf:{tmp_path / 'integers'}")


def test_tables_are_described_and_limits_hold(datasets, tmp_path):
    labelled(datasets).save_to_disk(tmp_path / "saved")
    source = f"hf:{tmp_path / 'saved'}"
    assert open_data(source).describe() == f"{source}: 6 images, 3 classes, 4 x 6, grey"
    with pytest.raises(ValueError, match=r"row 0 cannot be read \(it has 24 pixels, more than data\.max_pixels=20"):
        open_data(source, max_pixels=20)


def test_names_that_are_no_paths_are_one_line():
    for source in ("hf:~nobody-of-this-name/set", "hf:" + "a" * 5000):
        with pytest.raises(ValueError, match=r"not a valid path \(.*\); known"):
            open_data(source)


def test_labels_of_another_type_are_not_dropped_without_a_word(datasets, tmp_path):
    table(datasets, label=(range(6), datasets.Value("int64"))).save_to_disk(tmp_path / "saved")
    with pytest.warns(
        UserWarning, match=r"saved: column label is of type Value, so there are no labels; cast it to Class"
    ):
        assert open_data(f"hf:{tmp_path / 'saved'}").labels is None


def parquet(path, columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), path)
    return path


def test_a_parquet_file_is_read(datasets, tmp_path):
    labelled(datasets).to_parquet(tmp_path / "set.parquet")
    data = open_data(tmp_path / "set.parquet")
    np.testing.assert_array_equal(data.array()[:, 0], GREY)
    assert data.labels.tolist() == [2, 0, 1, 1, 0, 2]
    assert data.class_names == ("cat", "dog", "eel")


@pytest.mark.parametrize("shape", ["bytes", "structure"])
def test_a_parquet_file_of_other_programs_is_read(datasets, tmp_path, shape):
    files = [file_of(array) for array in GREY]
    column = files if shape == "bytes" else [{"bytes": content, "path": "x.png"} for content in files]
    path = parquet(tmp_path / "set.parquet", {"name": list("abcdef"), "jpg": column, "label": [0, 1, 2, 0, 1, 2]})
    data = open_data(path)
    np.testing.assert_array_equal(data.array()[:, 0], GREY)
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_parquet_file_without_images_or_that_is_none_is_an_error(datasets, tmp_path):
    with pytest.raises(UserError, match=r"set\.parquet: 2 rows of number; needs images"):
        open_data(parquet(tmp_path / "set.parquet", {"number": [1, 2]}))
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be loaded"):
        open_data(tmp_path / "bad.parquet")


def test_a_parquet_file_needs_the_library(tmp_path, monkeypatch):
    (tmp_path / "set.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"set\.parquet' needs datasets: pip install 'multistage-diffusion\[data\]'"):
        open_data(tmp_path / "set.parquet")


def test_images_of_tables_are_read_when_drawn_and_indexed_once(datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_indexes, "WORTH", 0.0)
    monkeypatch.setattr(kept_indexes, "SETTLED", -(10**9))
    monkeypatch.setattr(rows, "IN_MEMORY", 0)
    (tmp_path / "set").mkdir()
    labelled(datasets).to_parquet(tmp_path / "set" / "train-0.parquet")
    sources = [f"hf:{tmp_path / 'set'}", f"hf:{tmp_path / 'set'}:train[:2]"]
    first = [open_data(source).fingerprint for source in sources]
    monkeypatch.setattr(kept_indexes, "make_index", lambda *_: pytest.fail("the index was made again"))
    data = [open_data(source) for source in sources]
    assert [found.fingerprint for found in data] == first
    np.testing.assert_array_equal(data[0].rows([5, 1])[:, 0], [GREY[5], GREY[1]])
    assert len(data[1]) == 2
