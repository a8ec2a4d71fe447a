"""Networks with a shared encoder and one decoder per stage."""

from __future__ import annotations

from ..config import NetworkConfig
from .ddpmpp import DDPMppDecoder, DDPMppEncoder
from .ldm import LDMDecoder, LDMEncoder
from .meme import MEMEDecoder, MEMEEncoder
from .ncsnpp import NCSNppDecoder, NCSNppEncoder
from .unet import MultiDecoderUNet

__all__ = ["MultiDecoderUNet", "build_network"]


def build_network(config: NetworkConfig) -> MultiDecoderUNet:
    """Return a newly initialised network.

    Weights are drawn from torch's global generator. To only count parameters or FLOPs, call it inside
    `torch.device("meta")`. One decoder width gives the ordinary network of the family. `config.separate` gives one
    ordinary network per stage.
    """
    if config.family == "ncsnpp":
        return MultiDecoderUNet(config, NCSNppEncoder, NCSNppDecoder)
    if config.family == "ldm":
        return MultiDecoderUNet(config, LDMEncoder, LDMDecoder)
    if config.family == "meme":
        return MultiDecoderUNet(config, MEMEEncoder, MEMEDecoder)
    return MultiDecoderUNet(config, DDPMppEncoder, DDPMppDecoder)
