"""Reading other people's pickles: whatever they would run is refused, and not run."""

from __future__ import annotations

import ast
import collections
import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import Persistent, fake_modules, legacy_bytes

from multistage_diffusion.interop import published
from multistage_diffusion.interop.layouts import read_published
from multistage_diffusion.interop.published import Record, kind_of, read_pickle, read_torch, torch_bytes


class Call:
    """Pickled as a call: reading it makes the call, if it is read without care."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


class Build:
    """Pickled as an object of another class and its state."""

    def __init__(self, kind: type, state: Any) -> None:
        self.kind, self.state = kind, state

    def __reduce__(self) -> tuple[Any, ...]:
        return self.kind, (), self.state


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def payloads(canary: Path) -> dict[str, Any]:
    """Objects whose unpickling would make the canary."""
    python = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "eval": Call(eval, python),
        "exec": Call(exec, python),
        "subprocess": Call(subprocess.check_output, ["touch", str(canary)]),
        "getattr": Call(Lazy(getattr, canary, "touch")),
        "open": Call(open, str(canary), "w"),
        "__import__": Call(__import__, "antigravity"),
        "nested load": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {canary}"))),
        "torch.load": Call(torch.load, io.BytesIO(pickle.dumps(Call(os.system, f"touch {canary}")))),
        "write": Call(Path.write_text, canary, "x"),
    }


class Lazy:
    """A function that is itself the result of a call, inside a pickle."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __call__(self) -> None: ...

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


PAYLOADS = list(payloads(Path("canary")))


def global_call(module: str, name: str, argument: str, protocol: int) -> bytes:
    """Assemble a pickle that calls module.name(argument): GLOBAL, or STACK_GLOBAL, which may walk dots."""
    text = b"X" + len(argument).to_bytes(4, "little") + argument.encode()
    if protocol < 4:
        return b"\x80\x02c" + f"{module}\n{name}\n".encode() + text + b"\x85R."
    names = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + names + b"\x93" + text + b"\x85R."


def assert_refused(path: Path, canary: Path, reader: Callable[[Path], Any] = read_published) -> str:
    with pytest.raises(ValueError, match=r"refused|damaged|no checkpoint") as caught:
        reader(path)
    assert not canary.exists()
    text = str(caught.value)
    assert text.startswith(str(path))
    assert text.count(str(path)) == 1
    assert "\n" not in text
    assert len(text) < len(str(path)) + 260
    return text


def test_the_hostile_pickles_of_these_tests_do_what_they_threaten(canary: Path) -> None:
    pickle.loads(pickle.dumps(payloads(canary)["os.system"]))
    assert canary.exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_pickle_that_would_run_something_is_refused(name: str, protocol: int, canary: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    path.write_bytes(pickle.dumps({"ema": payloads(canary)[name]}, protocol))
    assert_refused(path, canary)


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("place", ["state", "source", "parameter", "buffer", "module", "arguments", "key"])
def test_nothing_is_run_inside_a_persistent_object(name: str, place: str, canary: Path, tmp_path: Path) -> None:
    path, evil = tmp_path / "net.pkl", payloads(canary)[name]
    with fake_modules():
        net = Persistent("EDMPrecond")
        if place == "state":
            net.evil = evil
        elif place == "source":
            net.__class__ = type("Net", (Persistent,), {"__reduce__": lambda self: with_source(self, evil)})
        elif place == "arguments":
            net._init_kwargs["evil"] = evil
        elif place == "key":
            net._parameters[evil] = None  # type: ignore[index]
        else:
            getattr(net, f"_{place}s")["evil"] = evil
        path.write_bytes(pickle.dumps({"ema": net}))
    assert "nothing of it was run" in assert_refused(path, canary)


def with_source(net: Persistent, evil: Any) -> tuple[Any, ...]:
    function, (meta,), _ = Persistent.__reduce__(net)
    return function, ({**meta, "module_src": evil},), None


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("archive", ["plain", "old", "zip"])
def test_nothing_is_run_inside_the_bytes_of_a_tensor(name: str, archive: str, canary: Path, tmp_path: Path) -> None:
    evil, path = payloads(canary)[name], tmp_path / "net.pkl"
    data = {"plain": pickle.dumps, "old": legacy_bytes, "zip": torch_bytes}[archive](evil)
    storage = Call(torch.storage._load_from_bytes, data)
    with fake_modules():
        net = Persistent("EDMPrecond")
        net._parameters["w"] = Call(torch._utils._rebuild_tensor_v2, storage, 0, (2,), (1,), False, None)  # type: ignore[assignment]
        path.write_bytes(pickle.dumps({"ema": net}))
    assert_refused(path, canary)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("suffix", ["pth", "ckpt"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_is_run_in_a_torch_archive(name: str, suffix: str, old: bool, canary: Path, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    content = {"model": {}, "state_dict": {}, "callbacks": {"x": [payloads(canary)[name]]}}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert_refused(path, canary)


def zip_archive(path: Path, pickled: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")


GLOBALS = [
    ("os", "system"),
    ("posix", "system"),
    ("torch", "serialization.os.system"),
    ("torch.serialization", "os.system"),
    ("torch.nn.modules.container", "warnings.sys.modules"),
    ("torch.nn.modules.module", "torch.os.system"),
    ("collections", "_sys.modules"),
    ("dnnlib.util", "os.system"),
    ("torch_utils.persistence", "sys"),
    ("numpy.core.multiarray", "os.system"),
    ("pytorch_lightning", "os.system"),
    ("builtins", "eval"),
    ("copyreg", "_reconstructor"),
]


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("module", "name"), GLOBALS)
def test_no_name_is_looked_up(module: str, name: str, protocol: int, canary: Path, tmp_path: Path) -> None:
    pickled = global_call(module, name, f"touch {canary}", protocol)
    (path := tmp_path / "net.pkl").write_bytes(pickled)
    assert f"{module}.{name}" in assert_refused(path, canary)
    zip_archive(path := tmp_path / "model.ckpt", pickled)
    if (module, protocol) in (("numpy.core.multiarray", 2), ("pytorch_lightning", 2)):
        assert isinstance(read_torch(path), Record)  # a placeholder was made, nothing else
        assert not canary.exists()
    else:
        assert_refused(path, canary)


def test_looking_up_a_hostile_name_would_have_found_it(canary: Path) -> None:
    pickle.loads(global_call("torch", "serialization.os.system", f"touch {canary}", 4))
    assert canary.exists()


def numbers() -> Any:
    """Return a storage of the numbers 0 to 3."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop such storages; published files are full of them
        return torch.arange(4.0).storage()


@pytest.mark.parametrize("codes", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"Q", b"P1\n"])
def test_extension_codes_and_persistent_ids_are_refused(codes: bytes, canary: Path, tmp_path: Path) -> None:
    (path := tmp_path / "net.pkl").write_bytes(b"\x80\x04N" + codes + b".")
    assert_refused(path, canary)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (10**6, 10**6), (0, 0)),  # would fill the memory once it is copied
        (0, (2,), (-1,)),
        (-1, (2,), (1,)),
        (0, ("2",), (1,)),
        (0, (2, 2), (1,)),
        (0, 4, 1),
    ],
)
def test_a_tensor_is_wholly_inside_its_storage(
    offset: Any, size: Any, stride: Any, canary: Path, tmp_path: Path
) -> None:
    storage = Call(torch.storage._load_from_bytes, legacy_bytes(numbers()))
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())
    (path := tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": tensor}))
    assert_refused(path, canary)


def test_the_bytes_of_a_tensor_are_an_archive_of_the_old_format(canary: Path, tmp_path: Path) -> None:
    for data in (torch_bytes(numbers()), legacy_bytes(torch.arange(4.0)), "text"):  # a zip archive; a tensor; no bytes
        storage = Call(torch.storage._load_from_bytes, data)
        (path := tmp_path / "net.pkl").write_bytes(pickle.dumps({"ema": storage}))
        assert "a tensor's storage is" in assert_refused(path, canary)


def test_tensors_in_a_pickle_are_read_to_the_number(tmp_path: Path) -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    content = {"view": values[1, :, ::2], "empty": torch.zeros(0, 3), "half": values.half(), "number": torch.tensor(7)}
    (path := tmp_path / "net.pkl").write_bytes(pickle.dumps(content))
    read = read_pickle(path)
    for name, value in content.items():
        assert torch.equal(read[name], value)
        assert read[name].dtype == value.dtype


def test_tensors_of_a_gpu_are_read_on_the_cpu(tmp_path: Path) -> None:
    here, there = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    data = legacy_bytes(numbers())
    assert here in data
    storage = Call(torch.storage._load_from_bytes, data.replace(here, there))
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, (4,), (1,), False, collections.OrderedDict())
    (path := tmp_path / "net.pkl").write_bytes(pickle.dumps(tensor))
    assert torch.equal(read_pickle(path), torch.arange(4.0))
    old = legacy_bytes({"w": torch.arange(4.0)})
    (path := tmp_path / "net.pth").write_bytes(old.replace(here, there))
    assert torch.equal(read_torch(path)["w"], torch.arange(4.0))


def test_placeholders_hold_state_and_run_nothing(tmp_path: Path) -> None:
    with fake_modules():
        net = Persistent("EDMPrecond", img_channels=3)
        net.augment = {"xflip": 1.0, "codes": {1, 2}}
        net.inner = torch.nn.ModuleDict({"conv": Persistent("Conv2d")})
        (path := tmp_path / "net.pkl").write_bytes(pickle.dumps(net))
    record = read_pickle(path)
    assert isinstance(record, Record)
    assert record.name == "EDMPrecond"
    assert record.state["augment"] == {"xflip": 1.0, "codes": {1, 2}}
    inner = record.state["_modules"]["inner"]
    assert isinstance(inner, Record)
    assert inner.state["_modules"]["conv"].name == "Conv2d"
    assert "torch_utils" not in sys.modules


@pytest.mark.parametrize("kind", ["zip", "old", "pickle", "safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_one_line(kind: str, share: float, canary: Path, tmp_path: Path) -> None:
    content = {"model": {"w": torch.randn(1000)}}
    make = {"zip": torch_bytes, "old": legacy_bytes, "pickle": pickle.dumps, "safetensors": safetensors_bytes}[kind]
    data = make(content)
    path = tmp_path / ("net.safetensors" if kind == "safetensors" else "net.pth")
    path.write_bytes(data[: int(share * len(data))])
    assert "truncated or damaged" in assert_refused(path, canary)


def safetensors_bytes(content: dict[str, dict[str, torch.Tensor]]) -> bytes:
    from safetensors.torch import save

    return save({"net.w": content["model"]["w"]})


def test_other_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.pth: no such file"):
        read_published(tmp_path / "x.pth")
    with pytest.raises(ValueError, match="it is a folder"):
        read_published(tmp_path)
    for name, data in {"empty.pth": b"", "text.pkl": b"cos\nsystem\n", "picture.ckpt": b"\x89PNG"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="is no checkpoint"):
            read_published(tmp_path / name)


def test_files_are_told_apart_by_their_content(tmp_path: Path) -> None:
    for name, data, kind in (
        ("a.ckpt", torch_bytes({}), "torch"),
        ("b.pkl", legacy_bytes({}), "torch"),
        ("c.pth", pickle.dumps({}), "pickle"),
    ):
        (tmp_path / name).write_bytes(data)
        assert kind_of(tmp_path / name) == kind


def test_reading_leaves_torch_s_own_reader_as_strict_as_it_was(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    with fake_modules():
        checkpoint = sys.modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint
        torch.save({"callbacks": {checkpoint: {}}}, tmp_path / "a.ckpt")
    read_torch(tmp_path / "a.ckpt")
    assert torch.serialization.get_safe_globals() == before


def test_torch_is_never_asked_to_unpickle_without_care() -> None:
    tree = ast.parse(Path(published.__file__).read_text())
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert len(loads) == 2
    for call in loads:
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}["weights_only"] == "True"
    unpicklers = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n).startswith("pickle.")]
    assert {ast.unparse(n) for n in unpicklers} == {"pickle.Unpickler", "pickle.UnpicklingError"}
