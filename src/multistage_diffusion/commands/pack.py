"""msdiff pack: write a data set into one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from ..console import Bar
from ..errors import UserError
from ..workflow.pack import pack
from .options import DataOptions, check_out, data_option, option, print_json, refuse_own_data, say


@dataclass(kw_only=True)
class Pack(DataOptions):
    """Write all images of a data set, at one size and without loss, into one file that is read faster.

    A zip file holds PNG images and their labels in dataset.json, as EDM's data sets do. A .npy file holds an array, with labels
    in FILE.labels.npy beside it; it is larger and read fastest. Training on the file gives the same run as training on DATA.

    Examples
      msdiff pack photos/ --size 64 64 --fit crop --out photos64.zip
      msdiff pack shards.tar --size 128 128 --fit crop --out shards.npy
    """

    data: Annotated[Positional[str], data_option()]
    out: Annotated[Path, option("FILE")]
    """FILE.zip or FILE.npy."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print file, number of images, shape, classes and fingerprint as JSON."""

    def run(self) -> None:
        """Run the command."""
        if self.held_out is not None:
            raise UserError(f"--held-out {self.held_out}: all images are packed; leave it out")
        check_out(self.out, self.overwrite)
        refuse_own_data(self.out, self.data)
        with Bar("packing", "images") as bar:
            data = pack(self.described(self.data), self.out, overwrite=self.overwrite, progress=bar)
        if self.json:
            print_json(
                {
                    "out": str(self.out),
                    "images": len(data),
                    "shape": list(data.shape),
                    "classes": list(data.class_names),
                    "fingerprint": data.fingerprint,
                }
            )
        else:
            say(f"written: {self.out} ({len(data)} images; next: msdiff train --data {self.out} ...)")
