"""What processes need, imported once in the server that they are forked from."""

import accelerate
import torch
import transformers
from transformers import LlamaForCausalLM, MistralForCausalLM

import pe_patch

__all__ = ["LlamaForCausalLM", "MistralForCausalLM", "accelerate", "pe_patch", "torch", "transformers"]
