"""Everything that depends on the version of another library.

Two kinds of names are used here and nowhere else:

- The cache argument of models, their outputs and mask functions, which Transformers 5.24 renamed from `past_key_values`
  to `cache`. A name that a later version invents is not guessed: a cache that arrives under it is an error, since a
  cache that is not seen gives silently wrong positions.
- Private names of other libraries. `PRIVATE_NAMES` lists them with the versions that were checked. A function of this
  file uses each of them, and `tests/test_compat.py` names the one that an installed version lacks.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cache as memoised
from importlib.util import find_spec
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.hub import cached_file

from .errors import CheckpointError, MissingPackageError, NoEffectError, UnsupportedError

OLDEST_TESTED = "5.17.0"
NEWEST_TESTED = "5.24.0"
"""The whole test suite or its fast subset passes on these versions and on the pinned one between them."""

INSTALLED = Version(transformers.__version__)

CHECKED_VERSIONS: Mapping[str, tuple[str, ...]] = {
    "transformers": (OLDEST_TESTED, "5.23.0", NEWEST_TESTED),
    "torch": ("2.13.0",),
    "accelerate": ("1.15.0",),
    "deepspeed": ("0.19.8",),
    "lm_eval": ("0.4.13",),
}
"""Versions of each library in which its private names were looked up."""


class PrivateName(NamedTuple):
    """A private name of another library, which any later version may rename or drop."""

    name: str
    owner: str
    """Dotted name of the module or class that has it, or of the function that takes it as a keyword or stores it."""
    used_by: str
    """The function, class or constant of this file that uses it."""
    versions: tuple[str, ...]
    """The checked versions that have it."""


PRIVATE_NAMES: list[PrivateName] = []
"""Every private name that pe_patch uses, in the order of this file."""

Item = TypeVar("Item", bound=Callable[..., Any])


def private(name: str, owner: str, used_by: str, versions: tuple[str, ...] = ()) -> str:
    """List a private name in `PRIVATE_NAMES`, and return it.

    Args:
        name: the name.
        owner: as in `PrivateName`.
        used_by: as in `PrivateName`.
        versions: the checked versions that have it; all of them by default.
    """
    PRIVATE_NAMES.append(PrivateName(name, owner, used_by, versions or CHECKED_VERSIONS[owner.split(".")[0]]))
    return name


def uses(owner: str, *names: str, versions: tuple[str, ...] = ()) -> Callable[[Item], Item]:
    """List the private names that the decorated function or class uses. The decorator returns it unchanged."""

    def listed(item: Item) -> Item:
        for name in names:
            private(name, owner, item.__name__, versions)
        return item

    return listed


EXTRAS: Mapping[str, tuple[str, ...]] = {
    "report": ("altair", "vl_convert", "jinja2"),
    "eval": ("wonderwords",),
    "train": ("omegaconf", "altair", "vl_convert"),
    "gguf": ("gguf",),
}
"""Optional packages of this library, by the extra that installs them."""


def require_extra(extra: str) -> None:
    """Raise `MissingPackageError` if a package of an extra is not installed."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"This needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Type: pip install 'pe_patch[{extra}]'"
        )


class UntestedVersionWarning(UserWarning):
    """The installed Transformers is newer or older than every version that pe_patch was tested on."""


def warn_if_untested() -> None:
    """Warn if the installed Transformers is newer than the newest tested one; a patch release counts as tested."""
    newest, oldest = Version(NEWEST_TESTED), Version(OLDEST_TESTED)
    if INSTALLED.release[:2] <= newest.release[:2] and INSTALLED >= oldest:
        return
    side = "newer" if INSTALLED > newest else "older"
    warnings.warn(
        f"transformers {INSTALLED} is {side} than every version that pe_patch was tested on ({OLDEST_TESTED} to "
        f"{NEWEST_TESTED}). Run `pe-patch selftest` before you trust its results, or install a tested version: "
        f"pip install 'transformers=={NEWEST_TESTED}'.",
        UntestedVersionWarning,
        stacklevel=4,  # past the module that calls this, and the package that imports it
    )


# The cache argument, and what else differs between versions of Transformers.

CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
"""Names of the cache argument in the forwards of models, layers and attentions, newest first."""


@memoised
def argument_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a method's arguments without `self` and without `**kwargs`."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Return what a forward calls its cache argument; None if it has no argument of a known name."""
    names = argument_names(function)
    return next((name for name in CACHE_ARGUMENTS if name in names), None)


COMPOSE_AXES = "recomposition_frequencies"
"""Name of the method by which a rotary module with M-RoPE joins the cos or sin of its three rows of positions. Checked
on Transformers 5.23 and 5.24."""


def compose_axes(rotary: Any, layer_type: str | None) -> Callable[[Any], Any] | None:
    """Return the function by which a rotary module joins the three rows of M-RoPE; None if it has one row."""
    compose = getattr(rotary, COMPOSE_AXES, None)
    if compose is not None and "layer_type" in inspect.signature(compose).parameters:
        return functools.partial(compose, layer_type=layer_type)
    return cast("Callable[[Any], Any] | None", compose)


def new_cache(base: Any, crossing: bool = False) -> Cache:
    """Return an empty cache of the class that a base model creates. MiniMax defines a class for it.

    Args:
        base: the model that holds the layers.
        crossing: it attends to the output of an encoder too.
    """
    if crossing or getattr(base.config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(config=base.config), DynamicCache(config=base.config))
    own = vars(sys.modules[type(base).__module__]).values()
    kinds = [each for each in own if isinstance(each, type) and issubclass(each, DynamicCache)]
    cls = next((each for each in kinds if each.__module__ == type(base).__module__), DynamicCache)
    return cls(config=base.config) if "config" in inspect.signature(cls).parameters else cls()


def check_text_forward(cls: type, needs_position_ids: bool) -> str | None:
    """Return the name of the cache argument of a language model's base model; None if it keeps no cache.

    Raises:
        UnsupportedError: the forward lacks one of the arguments that a patch reads, so that the installed Transformers
            has renamed it and the patch would not see it.
    """
    names, found = argument_names(cls.forward), cache_argument(cls.forward)
    missing = [name for name in ("input_ids", "attention_mask", "inputs_embeds") if name not in names]
    missing += ["position_ids"] if needs_position_ids and "position_ids" not in names else []
    if found is None and "use_cache" in names:
        missing.append("/".join(CACHE_ARGUMENTS))
    if missing:
        raise UnsupportedError(
            f"{cls.__name__}.forward of transformers {INSTALLED} takes no argument {missing[0]!r}; its arguments are "
            f"{', '.join(names)}. A patch would not see what it reads there. Install a tested version: "
            f"pip install 'transformers=={NEWEST_TESTED}'."
        )
    return found


def is_cache(value: Any) -> bool:
    """Return whether a value is a key-value cache, by its class or by what it can do."""
    return isinstance(value, Cache) or (hasattr(value, "get_seq_length") and hasattr(value, "update"))


def take_cache(kwargs: dict[str, Any], argument: str | None, owner: str) -> Any:
    """Return the cache among the keywords of one call, and leave it there under `argument` alone.

    Args:
        kwargs: keywords of a call of a forward; changed in place.
        argument: the name under which that forward takes its cache.
        owner: what to call the forward in an error.

    Raises:
        UnsupportedError: a cache came under a name that is not known, or two came.
    """
    found = {name: kwargs.pop(name) for name in CACHE_ARGUMENTS if kwargs.get(name) is not None}
    caches = list({id(value): value for value in found.values()}.values())
    if len(caches) > 1:
        raise UnsupportedError(f"{owner} was handed two caches, as {' and '.join(found)}; give one.")
    strange = [name for name, value in kwargs.items() if is_cache(value)]
    if strange:
        raise UnsupportedError(
            f"{owner} of transformers {INSTALLED} was handed a cache as {strange[0]!r}, a name that pe_patch does not "
            f"know (it knows {', '.join(CACHE_ARGUMENTS)}), so positions would be wrong. Install a tested version: "
            f"pip install 'transformers=={NEWEST_TESTED}'."
        )
    for name in CACHE_ARGUMENTS:
        kwargs.pop(name, None)
    if not caches:
        return None
    if argument is None:
        raise UnsupportedError(f"{owner} takes no cache, and was handed one as {next(iter(found))!r}.")
    kwargs[argument] = caches[0]
    return caches[0]


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """Return the cache among the keywords of a call, or None."""
    return next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)


def cache_keyword(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword by which a model takes a cache; empty for None."""
    if cache is None:
        return {}
    name = cache_argument(type(model).forward)
    if name is None:
        raise NoEffectError(f"{type(model).__name__}.forward takes no cache.")
    return {name: cache}


def cache_of(output: Any) -> Any:
    """Return the cache in a model's output, or None."""
    return getattr(output, "cache", None) if hasattr(output, "cache") else getattr(output, "past_key_values", None)


def checkpoints_layers(base: Any) -> bool:
    """Return whether a pass over this base model recomputes its layers in backward, and so fills no cache."""
    if not (getattr(base, "gradient_checkpointing", False) and base.training):
        return False
    return INSTALLED.release[:2] < (5, 24) or torch.is_grad_enabled()


MASK_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
"""Transformers' function for the mask of each layer type."""


def layer_mask(layer_type: str, cache: Any, **arguments: Any) -> Any:
    """Return the mask that Transformers makes for layers of one type: a tensor, a block mask, or None."""
    function = MASK_FUNCTIONS[layer_type]
    name = "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"
    return function(**{name: cache}, **arguments)


def attending_layer_types(config: Any) -> set[str]:
    """Return the layer types of a config whose layers attend and so need a mask; other types are those of hybrids.

    Checked on Transformers 5.23, whose types of other layers are linear_attention, conv, mamba and the like.
    """
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return {each for each in types if "attention" in each and "linear" not in each}


# Private names of Transformers: configs.

IMPLEMENTATION = private("_attn_implementation_internal", "transformers.PreTrainedConfig", "IMPLEMENTATION")
"""The attribute of a config with the name of the attention implementation. Models set it when they are built."""


@uses("transformers.PreTrainedConfig", "_attn_implementation")
def attention_implementation(config: Any) -> Any:
    """Return the name of the attention implementation of a config; None if no model was built from it."""
    return config._attn_implementation


@uses("transformers.PreTrainedConfig", IMPLEMENTATION)
def store_implementation(config: Any, name: Any) -> None:
    """Write the name of the attention implementation into one config, without its setter and `__setattr__`."""
    vars(config)[IMPLEMENTATION] = name


@uses("transformers.PreTrainedConfig", "_attn_implementation", IMPLEMENTATION)
class StoredImplementation:
    """A mixin for a config class whose `__setattr__` refuses `IMPLEMENTATION`: the property writes past it."""

    sub_configs: Mapping[str, Any]

    @property
    def _attn_implementation(self) -> Any:
        """The name of the attention implementation, as Transformers stores it."""
        return vars(self).get(IMPLEMENTATION)

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        whole = value.get("", self._attn_implementation) if isinstance(value, dict) else value
        store_implementation(self, whole)
        for name in self.sub_configs:
            if (sub_config := getattr(self, name, None)) is not None:
                sub_config._attn_implementation = value.get(name, whole) if isinstance(value, dict) else value


@uses("transformers.PreTrainedConfig", "_attn_implementation")
class ConfigView:
    """A view of a config that names another attention implementation."""

    def __init__(self, config: Any, implementation: str) -> None:
        self._native, self._attn_implementation = config, implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


@uses("transformers.PreTrainedConfig", "_name_or_path")
def values_without_source(config: Any) -> dict[str, Any]:
    """Return the values of a config without where it was read from, and without the version that reads it."""
    return {
        key: value for key, value in config.to_dict().items() if key not in ("_name_or_path", "transformers_version")
    }


@uses("transformers.PreTrainedConfig", "_commit_hash", versions=(OLDEST_TESTED,))
def commit_hash(config: Any) -> str | None:
    """Return the commit that a config was read from; None if unknown, as it always is from 5.23 on."""
    return getattr(config, "_commit_hash", None)


@uses(
    "transformers.utils.hub.cached_files",
    "_raise_exceptions_for_missing_entries",
    "_raise_exceptions_for_gated_repo",
)
def find_file(source: str, name: str, gated: bool = True, **options: Any) -> str | None:
    """Return the path of a file in a folder or repository, or None if there is no such file.

    Args:
        source: the folder or the name of the repository.
        name: the name of the file.
        gated: raise for a repository that asks for permission, instead of returning None.
        **options: keywords of Transformers' `cached_file`.
    """
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": gated}
    return cached_file(source, name, **options, **quiet)


def gguf_options() -> dict[str, Any]:
    """Return the keywords by which `from_pretrained` turns the blocks of a GGUF file into floats.

    Earlier versions, which have no `GgufConfig`, always do.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def forget_quantizer(model: Any) -> None:
    """Make a model an ordinary one: some versions call it quantised, and refuse to save it, though it holds floats."""
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config",)),
    ):
        for name in names:
            vars(owner).pop(name, None)


@uses("transformers.integrations.PeftAdapterMixin", "_hf_peft_config_loaded")
def has_adapter(model: Any) -> bool:
    """Return whether a model carries an adapter from its own `add_adapter` or `load_adapter`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


# Private names of Transformers: models, generation and caches.


@uses("transformers.PreTrainedModel", "_from_config")
def from_config(model_class: Any, config: Any) -> Any:
    """Build a model of a concrete class with new weights."""
    return model_class._from_config(config)


@uses("transformers.PreTrainedModel", "_from_config")
class BuiltFromConfig:
    """A mixin for a class that is registered with an auto class: `AutoModel.from_config` calls `build`."""

    @classmethod
    def build(cls, config: Any, **kwargs: Any) -> Any:
        """Build the model."""
        raise NotImplementedError

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return cls.build(config, **kwargs)


@uses("transformers.PreTrainedModel", "_init_weights")
def weight_initializer(model: Any) -> Callable[[nn.Module], None]:
    """Return the function with which a model initializes the weights of one module."""
    return model._init_weights


TRAINER_METHODS = tuple(
    private(name, "transformers.Trainer", "TRAINER_METHODS")
    for name in (
        "_clip_grad_norm",
        "_evaluate",
        "_get_grad_norm",
        "_get_output_dir",
        "_load_from_checkpoint",
        "_prepare_for_training",
        "_run_epoch",
        "_save_checkpoint",
    )
)
"""Methods of Transformers' Trainer that the trainer of recipes overrides."""


def check_trainer(trainer_class: type, methods: tuple[str, ...]) -> None:
    """Raise `UnsupportedError` if a class lacks one of the methods: an override would never be called."""
    missing = [name for name in methods if not hasattr(trainer_class, name)]
    if missing:
        raise UnsupportedError(
            f"Trainer of transformers {INSTALLED} has no {missing[0]!r}, which training replaces. Install a tested "
            f"version: pip install 'transformers=={NEWEST_TESTED}'."
        )


@uses("transformers.TrainingArguments", "_n_gpu")
def use_one_gpu(arguments: Any) -> None:
    """Keep a single process on one GPU: Trainer would run `nn.DataParallel` on all of them."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


@uses("transformers.models.bloom.modeling_bloom.BloomAttention", "_reshape")
def bloom_heads(attention: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value `[batch, heads, length, head]` of BLOOM's fused projection."""
    return attention._reshape(fused)


PREFILL = private("_prefill", "transformers.GenerationMixin", "PREFILL")
"""The method of a model by which `generate` reads a prompt."""


class Prefill(NamedTuple):
    """What `generate` is about to read."""

    chunk_size: int | None
    """Its `prefill_chunk_size`."""
    count: int
    """Number of tokens of the prompt, those in the cache included."""
    cache: Any
    """The cache, or None."""
    drafts: bool
    """Another call of `generate` only takes guesses from it."""


@uses("transformers.GenerationMixin", PREFILL)
def prefill_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prefill:
    """Return what one call of `PREFILL` is about to read."""
    given = _named_arguments(PREFILL, args, kwargs)
    settings = given["generation_config"]
    count, cache = given["input_ids"].shape[1], cache_in(given["model_kwargs"])
    return Prefill(settings.prefill_chunk_size, count, cache, bool(settings.is_assistant))


GUESSING = private("_get_candidate_generator", "transformers.GenerationMixin", "GUESSING")
"""The method of a model by which assisted and prompt-lookup generation begin."""


@uses("transformers.GenerationMixin", GUESSING)
def guessing_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the cache that one call of `GUESSING` names, or None."""
    return cache_in(_named_arguments(GUESSING, args, kwargs)["model_kwargs"])


def _named_arguments(method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a method of `GenerationMixin` by name."""
    return dict(zip(argument_names(getattr(GenerationMixin, method)), args, strict=False)) | kwargs


GENERATION_POSITIONS = private(
    "_prepare_position_ids_for_generation", "transformers.GenerationMixin", "GENERATION_POSITIONS"
)
"""The method of a model that counts the positions of a prompt in generation."""

GPTJ = "transformers.models.gptj.modeling_gptj.GPTJAttention"
BEFORE_24 = (OLDEST_TESTED, "5.23.0")
OWN_SCORES = Version("5.24") > INSTALLED
"""Whether GPT-J and CodeGen compute their scores themselves and not in the attention interface."""

SCORE_METHOD = private("_attn", GPTJ, "SCORE_METHOD", BEFORE_24)
"""The method of GPT-J's and CodeGen's attention that computes its scores and output. Transformers 5.24 has none."""

NEO_SCORE_METHOD = private(
    "_attn", "transformers.models.gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention", "NEO_SCORE_METHOD"
)
"""The method of GPT-Neo's and GPT NeoX Japanese's attention that computes its scores and output."""
private(
    NEO_SCORE_METHOD,
    "transformers.models.gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention",
    "NEO_SCORE_METHOD",
)

FALCON_SPLIT = private("_split_heads", "transformers.models.falcon.modeling_falcon.FalconAttention", "FALCON_SPLIT")
"""The method of Falcon's attention that splits a fused projection, to `[batch, tokens, heads, head]` three times."""

EMBED_POSITIONS = private("_get_embed_positions", GPTJ, "EMBED_POSITIONS", BEFORE_24)
"""The method of GPT-J's attention that returns its table of sines and cosines. Transformers 5.24 has none."""

STATIC_CACHE_SHAPE = private("_get_static_cache_init_shape", "transformers.GenerationMixin", "STATIC_CACHE_SHAPE")
"""The method of a model that returns the shape of a static cache before the first pass, or None if it is unknown."""


@uses("transformers.cache_utils.QuantizedLayer", "_quantize")
def is_quantized(cache_layer: Any) -> bool:
    """Return whether a layer of a cache quantizes its keys."""
    return hasattr(cache_layer, "_quantize")


# Private names of torch.


submodules: Callable[[nn.Module], dict[str, Any]] = attrgetter(private("_modules", "torch.nn.Module", "submodules"))
"""Return the dict in which a module holds its submodules."""


def submodules_of_any(module: nn.Module) -> dict[str, Any]:
    """Return what `submodules` does, and an empty dict for a module whose `__init__` has not run."""
    return submodules(module) if hasattr(module, "training") else {}


@uses("torch.nn.Module", "_modules")
def replace_submodules(module: nn.Module, modules: dict[str, nn.Module | None]) -> None:
    """Replace the dict in which a module holds its submodules, in one step."""
    vars(module)["_modules"] = modules


@uses("torch.nn.Module", "_parameters")
def own_parameters(module: nn.Module) -> dict[str, Any]:
    """Return the dict in which a module holds its parameters, without those of its submodules."""
    return vars(module)["_parameters"]


@uses("torch.nn.Module", "_parameters")
def replace_parameters(module: nn.Module, parameters: dict[str, Any]) -> None:
    """Replace the dict in which a module holds its parameters. The new values may be plain tensors."""
    vars(module)["_parameters"] = parameters


@uses("torch.nn.Module", "_non_persistent_buffers_set")
def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Return whether a buffer of a module belongs to its state dict."""
    return buffer not in module._non_persistent_buffers_set


WRAPPERS = (private("_orig_mod", "torch._dynamo.eval_frame.OptimizedModule", "WRAPPERS"), "module")
"""Attributes in which torch.compile and data parallelism keep the wrapped model."""


@uses("torch.Tensor", "_version")
def version_counter(tensor: Tensor) -> int:
    """Return autograd's version counter of a tensor, which in-place operations increase; -1 for inference tensors."""
    return -1 if tensor.is_inference() else tensor._version


def grows_plainly(layer: Any) -> bool:
    """Return whether a cache layer holds all its keys in one tensor, and replaces that tensor when it grows."""
    return type(layer) is DynamicLayer


@uses("torch.Tensor", "_base")
def base_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor that a view shows a part of; the tensor itself if it is not a view."""
    return tensor if tensor._base is None else tensor._base


@uses("torch", "_C.DisableTorchFunctionSubclass")
def without_torch_function() -> AbstractContextManager[None]:
    """Return a context in which operations ignore the `__torch_function__` of tensor subclasses."""
    return torch._C.DisableTorchFunctionSubclass()


@uses("torch.utils", "_pytree.tree_leaves")
def tree_leaves(tree: Any) -> list[Any]:
    """Return the values in nested lists, tuples and dicts."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(tree)


@uses("torch.utils", "_pytree.tree_map")
def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return nested lists, tuples and dicts with a function applied to every value."""
    from torch.utils._pytree import tree_map

    return tree_map(function, tree)


@uses("torch.ops.aten", "_scaled_dot_product_flash_attention_for_cpu")
def cpu_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Call torch's fused attention for CPUs, which returns the output and the log-sum-exp of each row."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, **kwargs)


@uses("torch.ops.aten", "_scaled_dot_product_flash_attention_for_cpu_backward")
def cpu_attention_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Call the backward pass of `cpu_attention`, which returns the gradients of query, key and value."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*args, **kwargs)


@uses("torch.nn.attention.flex_attention.create_block_mask", "_compile")
def block_mask(*args: Any, compiled: bool, **kwargs: Any) -> BlockMask:
    """Call `create_block_mask`. Compiled, it never materializes all pairs."""
    return create_block_mask(*args, **kwargs, _compile=compiled)


@uses("torch.cpu", "_is_avx512_bf16_supported")
def cpu_multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16; False if torch does not tell."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# Private names of accelerate.


@uses("accelerate.hooks.add_hook_to_module", "_hf_hook")
def execution_hook(module: nn.Module) -> Any:
    """Return the hook by which accelerate moves weights and inputs of a module; None if there is none."""
    return getattr(module, "_hf_hook", None)


@uses("accelerate.hooks.add_hook_to_module", "_hf_hook", "_old_forward")
def stored_method(module: nn.Module, name: str) -> str:
    """Return the attribute that holds a method of a module: accelerate's hook calls another one than `forward`."""
    return "_old_forward" if name == "forward" and execution_hook(module) is not None else name


@uses("accelerate.big_modeling", "_attach_context_parallel_hooks")
@uses("torch.nn.Module", "_forward_pre_hooks")
def drops_masks(module: nn.Module) -> bool:
    """Return whether accelerate's context parallelism removes the masks that an attention module is called with."""
    names = (getattr(hook, "__qualname__", "") for hook in module._forward_pre_hooks.values())
    return any("_attach_context_parallel_hooks" in name for name in names)


# Private and undocumented names of DeepSpeed.

ULYSSES = "deepspeed.runtime.sequence_parallel.ulysses_sp"
"""DeepSpeed's module that splits sequences over processes. It is not imported unless it is in use."""


@uses(ULYSSES, "UlyssesSPAttentionHF")
def ulysses_around(function: Any) -> Any:
    """Return the Ulysses module in the closure of the attention function that it registers; None for another one."""
    deepspeed = sys.modules.get(ULYSSES)
    if deepspeed is None:
        return None
    cells = (closure.cell_contents for closure in getattr(function, "__closure__", None) or ())
    return next((cell for cell in cells if isinstance(cell, deepspeed.UlyssesSPAttentionHF)), None)


ULYSSES_SHAPES = tuple(
    private(f"required_{tensor}_shape", f"{ULYSSES}.UlyssesSPAttentionHF", "ULYSSES_SHAPES")
    for tensor in ("query", "key_value", "context")
)
"""The shapes `[length, rows, ...]` that a Ulysses module checks its tensors against."""


@uses("deepspeed.runtime.engine.DeepSpeedEngine", "_config")
def set_gradient_clipping(engine: Any, norm: float) -> None:
    """Set the norm that DeepSpeed clips gradients to; 0 for no clipping."""
    engine._config.gradient_clipping = norm


@uses("deepspeed.runtime.engine.DeepSpeedEngine", "_zero3_consolidated_16bit_state_dict")
def consolidated_state_dict(engine: Any) -> dict[str, Tensor] | None:
    """Gather the weights that ZeRO-3 shards, of any dtype; None on all processes but the first."""
    return engine._zero3_consolidated_16bit_state_dict()


# Private names of lm-eval.


@uses("lm_eval.models.huggingface.HFLM", "_loglikelihood_tokens")
class ChecksRequests:
    """A mixin for a subclass of lm-eval's `HFLM`: `check_tokens` sees the token ids before the model scores them."""

    def check_tokens(self, requests: list[Any]) -> None:
        """Raise if a request, `(texts, context ids, answer ids)`, cannot be scored."""
        raise NotImplementedError

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> list[tuple[float, bool]]:
        self.check_tokens(requests)
        inner: Any = super()
        return inner._loglikelihood_tokens(requests, *arguments, **options)


def source_tokenizer(model: Any) -> Any:
    """Load the tokenizer of the folder or hub name that a model was loaded from.

    Raises:
        CheckpointError: the model has no source, or the source has no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer  # slow to import

    name = getattr(model, "name_or_path", "")
    if not name:
        raise CheckpointError("this model was not loaded from anywhere that has a tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the type of error depends on the hub, the folder and the tokenizer class
        raise CheckpointError(f"the tokenizer of {name!r} cannot be loaded ({type(error).__name__})") from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        # For some families Transformers builds a tokenizer without vocabulary if the folder has no tokenizer files.
        raise CheckpointError(f"{name!r} has no tokenizer")
    return tokenizer
