"""Shared parts of the commands: options, reading settings and configurations, printing."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..config import DataConfig, RunConfig, SamplingConfig
from ..config.sampling import SOLVERS, SPACINGS, changed_sampler
from ..config.serialization import from_dict, read_json
from ..data.sources import forms
from ..errors import UserError
from ..escaping import shown
from ..evaluation import agree
from ..files import refuse_special
from ..output_paths import require_place
from ..reading import YAML_LIMIT, parse_yaml, read_text
from ..training.run import belongs_to_a_run


def option(metavar: str, default: str = "") -> Any:
    """Return the display, in help, of an option that has no default or whose default is set elsewhere."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")


def one_of(names: Iterable[str]) -> str:
    """Return the metavar of an option that takes one of these names."""
    return f"{{{','.join(names)}}}"


def data_option(default: str = "") -> Any:
    """Return the display of DATA in help: how each source is written."""
    hint = f"(default: {default})" if default else None
    return tyro.conf.arg(metavar="DATA", help=forms(), help_behavior_hint=hint)


RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="RUN", metavar="RUN")]


Device = Annotated[str | None, option("DEVICE", "CUDA when there is one")]


Average = Annotated[float | None, option("SIGMA_REL", "the checkpoint's own average")]


Changes = Annotated[tuple[str, ...], option("KEY=VALUE ...")]


def _else(default: object) -> str:
    """Return the default that help shows for an option of how images are read."""
    return f"that of the preset or run, else {default}"


@dataclass(kw_only=True)
class DataOptions:
    """How images are read."""

    size: Annotated[tuple[int, int] | None, option("H W", _else("the images' size"))] = None
    """Height and width of the images (one number: a square); --fit says what is done with images of another size."""
    fit: Annotated[
        Literal["exact", "crop", "resize", "pad"] | None,
        option("{exact,crop,resize,pad}", "the run's or preset's; else crop"),
    ] = None
    """Images of another size than --size: exact refuses them, crop keeps the centre, resize scales, pad adds black."""
    skip_bad: bool = False
    """Skip images that cannot be read instead of stopping."""
    max_pixels: Annotated[int | None, option("INT", _else(DataConfig.max_pixels))] = None
    """Images of more pixels count as unreadable."""
    held_out: Annotated[float | None, option("SHARE", _else(DataConfig.held_out))] = None
    """Share of images that are not trained on; a hash of their content selects them."""

    def given(self) -> dict[str, Any]:
        """Return the options that were given, named as in DataConfig."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(DataOptions)}
        return {k: v for k, v in values.items() if v is not None and v is not False}

    def described(self, source: str) -> DataConfig:
        """Return how a source is read; images of another size than --size are cropped unless --fit is given."""
        given = self.given()
        return DataConfig(source=source, **({"fit": "crop"} if "size" in given else {}) | given)

    def dotted(self) -> dict[str, Any]:
        """Return the options that were given as dotted keys of a run's configuration."""
        return {f"data.{name}": value for name, value in self.given().items()}


@dataclass(kw_only=True)
class SamplerOptions:
    """Changes to the run's sampler."""

    solver: Annotated[str | None, option(one_of(SOLVERS), "the run's")] = None
    """DPM-Solver, DPM-Solver++ (data prediction), DDIM, Heun (EDM), or another."""
    method: Annotated[Literal["singlestep", "multistep"] | None, option("{singlestep,multistep}", "the run's")] = None
    """Singlestep or multistep (dpm and dpm++ only)."""
    order: Annotated[int | None, option("INT", "the run's")] = None
    """Order of the solver: 1 to 3 (dpm and dpm++ only)."""
    calls: Annotated[int | None, option("INT", "the run's")] = None
    """Denoiser calls per image (NFE)."""
    spacing: Annotated[str | None, option(one_of(SPACINGS), "the run's")] = None
    """Spacing of the noise levels."""
    churn: Annotated[float | None, option("FLOAT", "the run's")] = None
    """Stochasticity of heun (S_churn)."""
    eta: Annotated[float | None, option("FLOAT", "the run's")] = None
    """Stochasticity of ddim."""
    guidance: Annotated[float | None, option("FLOAT", "the run's")] = None
    """Classifier-free guidance: 0 unconditional, 1 conditional."""
    guidance_interval: Annotated[tuple[float, float] | None, option("LOW HIGH", "the run's")] = None
    """Guidance is applied where LOW < sigma <= HIGH."""
    threshold: Annotated[float | None, option("SHARE", "the run's")] = None
    """Dynamic thresholding of pixels at this quantile, e.g. 0.995."""
    lower_final: Annotated[Literal["always", "published"] | None, option("{always,published}", "the run's")] = None
    """Steps of lower order: always for the last and for too long steps, or as published."""
    denoise_last: Annotated[Literal["auto", "always", "never"] | None, option("{auto,always,never}", "the run's")] = (
        None
    )
    """Use the last call to remove the noise that is left; auto: if it is visible."""
    third_order: Annotated[Literal["exact", "published"] | None, option("{exact,published}", "the run's")] = None
    """Multistep order 3 with its exact second derivative, or half of it, as in the published code (dpm and dpm++)."""

    def sampling_config(self, own: SamplingConfig) -> SamplingConfig:
        """Return a run's sampling configuration with these options applied."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplerOptions)}
        found = changed_sampler(own, {name: value for name, value in values.items() if value is not None})
        if self.guidance_interval is not None and found.guidance == 1:
            raise UserError("--guidance-interval: guidance 1 guides nothing; give another --guidance, too")
        return found


def check_out(path: Path, overwrite: bool, *, folder: bool = False) -> None:
    """Check, before the work starts, that its result can be written.

    Raises:
        UserError: if path exists and may not be replaced, or nothing can be written there.
    """
    if path.name in ("", ".."):
        raise UserError(f"--out {path}: is not the name of a {'folder' if folder else 'file'}; give one")
    if not folder:
        refuse_special(path)
    if path.exists():
        if not overwrite:
            raise UserError(f"--out {path}: exists; choose another name or give --overwrite")
        if path.is_file() and belongs_to_a_run(path):
            raise UserError(f"--out {path}: is a file of a run; choose another name")
        if path.is_dir() != folder:
            raise UserError(f"--out {path}: is a {'file' if folder else 'folder'}; choose another name")
    require_place(path)


def refuse_own_data(out: Path, source: str) -> None:
    """Refuse to replace the file that is read.

    Raises:
        UserError: if out and source are the same file.
    """
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise UserError(f"--out {out}: is DATA; choose another name")


def dotted_changes(options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return options and the settings of --set as one mapping of dotted keys, for `override`.

    Args:
        options: values of options by dotted key; None: not given.
        settings: see `parse_changes`.

    Raises:
        UserError: if an option and --set give the same key, or a setting is not KEY=VALUE.
    """
    given, changes = {key: value for key, value in options.items() if value is not None}, parse_changes(settings)
    twice = sorted(given.keys() & changes.keys())
    if twice:
        raise UserError(f"--set {twice[0]}: an option gives it, too; give one of them")
    return given | changes


def parse_changes(settings: Sequence[str]) -> dict[str, Any]:
    """Return {"optimizer.lr": 1e-4} from ["optimizer.lr=1e-4"]; of a key that is given twice the last value.

    Raises:
        UserError: if a setting is not KEY=VALUE with a YAML value.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UserError(f"--set {setting}: must be KEY=VALUE, e.g. optimizer.lr=1e-4")
        changes.pop(key, None)  # so that the last value also has the last place
        changes[key] = plain_numbers(parse_yaml(value, f"--set {setting}", f": {value!r} is not a YAML value"))
    features = changes.get("evaluation.features")
    if isinstance(features, str):
        agree(features)
    return changes


def plain_numbers(value: Any) -> Any:
    """Convert text such as 1e-4, which YAML does not read as a number, to numbers, also in lists and mappings."""
    if isinstance(value, dict):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def load_config(path: Path) -> RunConfig:
    """Read a run configuration from JSON or YAML.

    Raises:
        UserError: naming the file, the key and the value.
    """
    if path.suffix not in (".yaml", ".yml"):
        data = read_json(path)
    else:
        data = plain_numbers(parse_yaml(read_text(path, YAML_LIMIT, "YAML"), path))
    try:
        return from_dict(RunConfig, data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def say(text: str) -> None:
    """Print text on standard output, with control characters escaped."""
    _print(shown(text, lines=True))


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    _print(json.dumps(value, indent=2, allow_nan=False))


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output: cannot be written ({error.strerror or error}); free some space") from None
