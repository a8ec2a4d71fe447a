"""Safe reading of published checkpoints: no code that they name is imported or run. Only this module unpickles.

Torch archives are read by torch's restricted reader (`weights_only=True`); classes of a few training frameworks become
placeholders. Pickles of EDM's persistent objects are read by an unpickler that knows a dozen harmless names and torch's
module classes, which become placeholders. Any other name raises an error of one line that contains the name. Such names
are never resolved.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..archives import require_intact
from ..errors import UserError
from ..reading import require_file

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # torch's magic number, pickled
_PICKLE = b"\x80"  # protocol 2 and later

# Names in Lightning checkpoints beside the weights. None is imported; placeholders replace them.
_FRAMEWORKS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.")
_BESIDES = (
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    "argparse.Namespace",
    "collections.defaultdict",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "typing.Any",
)
_EDM_OBJECT = "torch_utils.persistence._reconstruct_persistent_obj"
_MAPPINGS = (".defaultdict", ".AttributeDict")


class Record:
    """A placeholder for an object whose class is not imported.

    Attributes:
        name: name of its class, if known.
        state: the pickled state of the object; for a module its `__dict__`.
    """

    name: str = ""
    state: Any = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        """Accept and ignore any arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Mapping:
    """A placeholder for dictionary classes; calling it returns a plain dict."""

    def __new__(cls, *args: Any) -> Any:
        return {}


class _Dict(dict[Any, Any]):
    """EDM's dictionary class, without its attribute access."""


def kind_of(path: Path) -> Literal["torch", "pickle", "safetensors"]:
    """Return the format of a checkpoint file, from its first bytes or, for safetensors, from its suffix.

    Raises:
        UserError: if it cannot be read or has another format.
    """
    if path.exists():
        require_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(len(_LEGACY))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".safetensors":
        return "safetensors"
    if head.startswith((_ZIP, _LEGACY)):
        return "torch"
    if head.startswith(_PICKLE):
        return "pickle"
    raise UserError(f"{path}: is no checkpoint (neither a torch archive nor a pickle nor named .safetensors)")


def read_torch(path: Path) -> Any:
    """Read a file of torch.save, with tensors on the CPU.

    Objects of Lightning, OmegaConf, NumPy and a few standard classes become placeholders.

    Raises:
        UserError: one line, if the file is damaged or names something that is neither a tensor nor one of those.
    """
    try:
        require_intact(path)
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (_Mapping if name.endswith(_MAPPINGS) else Record, name) for name in _strangers(path)
        ]
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore")  # about unusual pickles; unreadable ones raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile file can raise any exception type
        raise UserError(f"{path}: {_reason(error)}") from None


def _strangers(path: Path) -> list[str]:
    """Return the names in a torch archive that torch's reader does not know and that placeholders may replace.

    For the old format, which Lightning never wrote, it returns none, so torch's reader raises on such names.

    Raises:
        Refused: for any other unknown name.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    if _EDM_OBJECT in names:
        raise Refused(
            "refused: it is EDM's training state, which stores the network as source code; import the network-snapshot-*.pkl "
            "of the same training, its average"
        )
    for name in names:
        if name not in _BESIDES and not name.startswith(_FRAMEWORKS):
            raise Refused(_refusal(name))
    return names


def _refusal(name: str) -> str:
    return f"refused: it names {name}, which no checkpoint of this kind needs; nothing of it was run"


def _reason(error: Exception) -> str:
    """Return one line with the reason why a checkpoint could not be read."""
    text = str(error)
    if found := re.search(r"WeightsUnpickler error: *([^\n]*)", text):  # without torch's advice to read it unsafely
        text = found[1]
    named = re.search(r"GLOBAL (\w[\w.]+)", text)
    if isinstance(error, Refused):
        return text
    if named:
        return _refusal(named[1])
    if isinstance(error, EOFError | RuntimeError | OSError) or "truncated" in text:
        return f"is truncated or damaged ({_first_line(text) or type(error).__name__})"
    return f"refused: not what a checkpoint is made of ({_first_line(text) or type(error).__name__})"


def _first_line(text: str) -> str:
    return " ".join(text.split())[:160].strip()


class Refused(pickle.UnpicklingError):
    """A pickle contains something that no checkpoint needs."""


def read_pickle(path: Path) -> Any:
    """Read a pickle of EDM's persistent objects: tensors, plain values, and Records in place of other objects.

    The source code in such a pickle is neither run nor kept.

    Raises:
        UserError: one line, if the file is damaged or contains a name that is not allowed.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about its old storages
            return _Unpickler(file).load()
    except Exception as error:  # a damaged or hostile file can raise any exception type
        raise UserError(f"{path}: {_reason(error)}") from None


class _Unpickler(pickle.Unpickler):
    """Accepts only the names of _KNOWN and torch's module classes; imports none of them."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of an allowed name; raise Refused for any other."""
        full = f"{module}.{name}"
        if full in _KNOWN:
            return _KNOWN[full]
        if module.startswith("torch.nn.modules.") and name.isidentifier():
            return Record
        raise Refused(_refusal(full))


def _persistent(meta: Any) -> Record:
    """Replace torch_utils.persistence._reconstruct_persistent_obj: keep the object's state, not its source."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise Refused("refused: a persistent object without a class")
    record = Record()
    record.name, record.state = meta["class_name"], meta.get("state")
    return record


def _storage(data: Any) -> torch.storage.TypedStorage:
    """Replace torch.storage._load_from_bytes: read a storage from a torch archive of the old format in the pickle."""
    if not isinstance(data, bytes) or not data.startswith(_LEGACY):
        raise Refused("refused: a tensor's storage is no torch archive")
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise Refused(f"refused: a tensor's storage is a {type(storage).__name__}")
    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """Replace torch._utils._rebuild_tensor_v2: return a view of a storage; raise if it exceeds the storage."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, torch.storage.TypedStorage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Refused("refused: a tensor without a storage, or of impossible shape")
    values, plain = torch.empty(0, dtype=storage.dtype), storage.untyped()  # type: ignore[no-untyped-call]
    held = plain.nbytes() // values.element_size()
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= held or torch.Size(size).numel() > held):
        raise Refused(f"refused: a tensor of shape {list(size)} in a storage of {held} numbers")
    return values.set_(plain, offset, size, stride)


def _parameter(value: Any, *_: Any) -> Any:
    """Replace torch._utils._rebuild_parameter: return the tensor itself."""
    return value


_KNOWN: dict[str, Callable[..., Any]] = {
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "dnnlib.util.EasyDict": _Dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    _EDM_OBJECT: _persistent,
    # used in augmentation and loss objects only, never for weights
    **dict.fromkeys(("numpy.ndarray", "numpy.dtype"), Record),
    **{
        f"{package}.multiarray.{name}": Record
        for package in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    },
}


def torch_bytes(content: Any) -> bytes:
    """Return the bytes that torch.save writes for tensors and plain values."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
