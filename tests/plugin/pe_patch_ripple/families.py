"""A family that pe_patch does not know: a Llama under another name."""

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pe_patch import Adapter, register_adapter


class RippleConfig(LlamaConfig):
    model_type = "ripple_llama"


class RippleForCausalLM(LlamaForCausalLM):
    config_class = RippleConfig


AutoConfig.register("ripple_llama", RippleConfig)
AutoModelForCausalLM.register(RippleConfig, RippleForCausalLM)
register_adapter("ripple_llama", Adapter(summary="a Llama under another name"))
