"""Messages about our settings become messages about the file's."""

from __future__ import annotations

import pytest

from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.file_terms import file_terms

SOURCES = {"network.dropout": "p=2.0", "sampling.clip": "clip_sample_range=-1", "network": "widths=[6]"}

CASES = [
    ("network.dropout=2.0 must be in [0, 1)", "p=2.0 must be in [0, 1)"),
    ("network.num_classes 1000 is more than 100", "widths=[6]: 1000 is more than 100"),
    ("network.channel_mult=[1, 2] must be positive", "widths=[6] must be positive"),
    ("network.channel_mult: factor 2 is more than 1", "widths=[6]: factor 2 is more than 1"),
    ("network.encoder_width or decoder_widths: width 7 is odd", "widths=[6]: width 7 is odd"),
    ("network: width 6 must be even", "widths=[6]: width 6 must be even"),
    ("heads of network.dropout=2 do not fit", "p=2.0: heads of network.dropout=2 do not fit"),
    ("sampling.clip=-1.0 must be positive", "clip_sample_range=-1 must be positive"),
    ("my.network.dropout=2 is another", "my.network.dropout=2 is another"),
    ("act_fn='mish': only silu", "act_fn='mish': only silu"),
]


@pytest.mark.parametrize(("ours", "theirs"), CASES)
def test_a_refusal_names_what_the_file_says(ours: str, theirs: str) -> None:
    with pytest.raises(UserError) as error, file_terms(SOURCES):
        raise UserError(ours)
    assert str(error.value) == theirs


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), file_terms(SOURCES):
        raise KeyError("network.dropout")
    with file_terms(SOURCES):
        pass
