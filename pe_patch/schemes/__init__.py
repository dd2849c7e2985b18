"""Every positional scheme by its name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..scheme import Scheme
from . import absolute, bias, decay, fire, grid, latent, relative, remap, rotary

SCHEMES: Mapping[str, type[Scheme]] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            absolute.Integer,
            absolute.OneHot,
            absolute.Sinusoidal,
            absolute.Learned,
            absolute.NoPE,
            absolute.DroPE,
            rotary.RoPE,
            rotary.Linear,
            rotary.NTK,
            rotary.NTKByParts,
            rotary.DynamicNTK,
            rotary.YaRN,
            rotary.DynamicYaRN,
            rotary.Llama3,
            rotary.LongRoPE,
            rotary.Proportional,
            rotary.ClippedRoPE,
            rotary.Resonance,
            decay.XPos,
            decay.RoPEALiBi,
            remap.ReRoPE,
            remap.LeakyReRoPE,
            remap.SelfExtend,
            remap.DCA,
            remap.STRING,
            remap.LMInfinite,
            bias.ALiBi,
            bias.T5,
            bias.Kerple,
            bias.Sandwich,
            fire.FIRE,
            relative.Shaw,
            relative.TransformerXL,
            relative.CoPE,
            latent.MLA,
            grid.RoPE2D,
            grid.ALiBi2D,
        )
    }
)

ALIASES: Mapping[str, str] = MappingProxyType({"pi": "linear", "dynamic": "dynamic_ntk", "p_rope": "proportional"})
