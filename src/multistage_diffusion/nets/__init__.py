"""Networks with a shared encoder and one decoder per stage; every other file but a few holds a family."""

from .network import MultiDecoderNetwork as MultiDecoderNetwork
from .network import build_network as build_network
