"""Image data sets of Hugging Face's library `datasets`, from the hub or a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...reading import read_file
from ..bounded import FILE_LIMIT
from ..dataset import ImageData
from ..decoded import open_files
from ..image_files import ImageFiles, Stamps, file_times
from ..opening import one_line
from ..options import Options
from . import SOURCES, Files, Named, absolute, to_path

_UNTYPED = ("label", "labels", "fine_label", "class")  # columns whose name suggests labels


def open_hub(rest: str, options: Options) -> ImageData:
    """Open a split of a data set: its images and, if present, its class labels.

    The images are the first column of type Image, the labels the first of type ClassLabel. Images are decoded like
    those of a folder.

    Args:
        rest: NAME or NAME:SPLIT. NAME is a data set on the hub (OWNER/NAME), or a folder written by save_to_disk or
            readable by load_dataset (Parquet files, images). SPLIT is "train" by default; slices such as
            "train[:1000]" work, except for folders written by save_to_disk.
        options: how images are read.

    Raises:
        UserError: if the library `datasets` is missing, if the data set, split or image column does not exist, and as
            `open_files`.
    """
    title = f"hf:{rest}"
    name, _, split = rest.partition(":")  # a split may hold colons: train[:1000]
    path = to_path(name)
    if not name or (name[0] in "./~" and not path.is_dir()):
        raise UserError(f"data.source='{title}': no such folder; give hf:FOLDER[:SPLIT] or hf:OWNER/NAME[:SPLIT]")
    rows = _load(title, path, split)
    image, label = _column(title, rows, "Image"), _column(title, rows, "ClassLabel")
    if label is None:
        _warn_of_untyped(title, rows)
    return _open_rows(title, rows, image, label, options)


def open_parquet(path: Path, options: Options) -> ImageData:
    """Open a Parquet file: its images and, if present, their class labels.

    The images are the first column of type Image, else of binary values or of structures with `bytes`. The labels are the
    first column of type ClassLabel, else an integer column named label, labels, fine_label or class.

    Raises:
        UserError: if the library `datasets` is missing, if the file is not readable or has no images, and as `open_files`.
    """
    title = str(path)
    rows = _loaded(title, partial(_load_parquet, title))
    image = _column(title, rows, "Image") or next((n for n, f in rows.features.items() if _holds_files(f)), None)
    label = _column(title, rows, "ClassLabel") or next((n for n in _UNTYPED if _holds_integers(rows, n)), None)
    return _open_rows(title, rows, image, label, options)


def _load_parquet(title: str, datasets: Any) -> Any:
    """Load a Parquet file without the progress bar of the library, which speaks of splits."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset("parquet", data_files=title, split="train")
    finally:
        if shown:
            datasets.enable_progress_bars()


def _open_rows(title: str, rows: Any, image: str | None, label: str | None, options: Options) -> ImageData:
    if image is None or not len(rows):
        raise UserError(
            f"{title}: {len(rows)} rows of {', '.join(rows.features)}; needs images (a column of type Image)"
        )
    cells = _cells(rows, image)
    files = ImageFiles(
        title, [f"row {i}" for i in range(len(rows))], _reader(cells, image), _stamps(title, rows, cells[0][image])
    )
    if label is None:
        return open_files(files, None, options)
    return open_files(files, rows[label][:], options, tuple(getattr(rows.features[label], "names", ())))


def _holds_files(feature: Any) -> bool:
    """Return whether a column holds image files without saying so."""
    kind = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(kind, "dtype", "") in ("binary", "large_binary")


def _holds_integers(rows: Any, name: str) -> bool:
    return name in rows.features and "int" in getattr(rows.features[name], "dtype", "")


def _load(title: str, path: Path, split: str) -> Any:
    """Return the rows of a split; `path` is a folder or a name on the hub."""

    def load(datasets: Any) -> Any:
        if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            if (split or "train") not in splits and (split or len(splits) > 1):
                raise UserError(f"no split {split or 'train'!r} among {', '.join(splits)}")
            return splits[split or "train"] if len(splits) > 1 else next(iter(splits.values()))
        return datasets.load_dataset(str(path), split=split or "train")

    return _loaded(title, load)


def _loaded(title: str, load: Callable[[Any], Any]) -> Any:
    """Return what `load` returns, given the library `datasets`."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"data.source='{title}' needs datasets: pip install 'multistage-diffusion[data]'") from None
    try:
        return load(datasets)
    except MemoryError:
        raise
    except Exception as error:  # the library, its readers and the network raise many exception types
        raise UserError(
            f"{title}: cannot be loaded ({one_line(error)}); check name, split and network, or give hf:FOLDER[:SPLIT]"
        ) from None


def _column(title: str, rows: Any, kind: str) -> str | None:
    """Return the first column with a feature of this type; warn if there are several."""
    names = [name for name, feature in rows.features.items() if type(feature).__name__ == kind]
    if len(names) > 1:
        warnings.warn(f"{title}: the first of the {kind} columns {', '.join(names)} is used", stacklevel=4)
    return names[0] if names else None


def _warn_of_untyped(title: str, rows: Any) -> None:
    """Warn of a column whose name suggests labels but whose type is not ClassLabel."""
    names = [name for name in _UNTYPED if name in rows.features]
    if names:
        warnings.warn(
            f"{title}: column {names[0]} is of type {type(rows.features[names[0]]).__name__}, so there are no labels; cast "
            "it to ClassLabel if it holds classes",
            stacklevel=4,
        )


def _cells(rows: Any, column: str) -> Any:
    """Return the rows with their image files undecoded, and nothing else."""
    import datasets

    return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _reader(cells: Any, column: str) -> Callable[[int], bytes]:
    """Return a function that reads the image file of a row."""

    def read(number: int) -> bytes:
        cell = cells[number][column]
        if cell is None:
            raise UserError("no image")
        data: bytes = read_file(Path(cell["path"]), FILE_LIMIT) if cell["bytes"] is None else cell["bytes"]
        return data

    return read


def _stamps(title: str, rows: Any, first: Any) -> Stamps | None:
    """Return the stamps of the table's files; None if images are elsewhere (see the first cell), or the table is in memory."""
    tables = [Path(found["filename"]) for found in rows.cache_files]
    if not tables or first is None or first["bytes"] is None:
        return None
    times = [(str(path), file_times(path.stat())) for path in tables]
    return Stamps.of(title, [(rows._fingerprint, (len(rows), 0, 0)), *times])


def _located(rest: str) -> str:
    name, colon, split = rest.partition(":")
    return f"{absolute(name)}{colon}{split}"


SOURCES.add("hf")(Named("hf:NAME[:SPLIT]", open_hub, _located))
SOURCES.add("parquet")(Files(".parquet", lambda path: path.suffix.lower() == ".parquet", open_parquet))
