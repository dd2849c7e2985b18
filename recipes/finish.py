"""From a trained model to what is kept of it: merged, saved, exported, described."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import card
from .quantise import merge_saved

if TYPE_CHECKING:
    from .trainer import Trainer


def finish(trainer: Trainer) -> Any:
    """Write `<output>/model` with its card and `<output>/export/<target>`; returns the model as it was saved."""
    recipe, engine, accelerator = trainer.recipe, trainer.engine, trainer.accelerator
    weights = engine.full_state_dict()
    model = engine.unwrapped().eval()
    merges = recipe.lora is not None and recipe.lora.merge
    # Processes that hold parts, and weights of 4 bits, have nothing whole that a merge could be added to.
    anew = merges and (engine.sharded or recipe.model.quantization is not None)
    if merges and not anew:
        model = model.merge_and_unload()
    if accelerator.is_main_process:
        if anew:
            model, weights = _merged_anew(trainer, model, weights), None
        if weights is not None:  # gathered, tied weights are no longer the same tensor
            tied = getattr(model, "all_tied_weights_keys", {})
            weights = {name: tensor for name, tensor in weights.items() if name not in tied}
        folder = trainer.output / "model"
        model.save_pretrained(folder, state_dict=weights)
        trainer.tokenizer.save_pretrained(folder)
        exported = [_export(trainer, target) for target in recipe.export]
        card.write(trainer)
        if recipe.progress:
            trainer.log.console.print("Written: " + ", ".join(str(path) for path in (folder, *exported)))
    accelerator.wait_for_everyone()
    accelerator.end_training()  # takes the process group down, so nothing may come after it
    return model


def _merged_anew(trainer: Trainer, model: Any, weights: dict[str, Any] | None) -> Any:
    """The base model loaded again, unquantised, with the trained adapters merged into it."""
    adapter = trainer.output / "adapter"
    model.save_pretrained(adapter, state_dict=weights)
    return merge_saved(adapter, getattr(torch, trainer.recipe.model.dtype))


def _export(trainer: Trainer, target: str) -> Any:
    """Export what was saved, as it was saved."""
    import pe_patch
    from pe_patch.export import save_tokenizer

    path = pe_patch.export(pe_patch.load_patched(trainer.output / "model"), trainer.output / "export" / target, target)
    save_tokenizer(trainer.tokenizer, path, target)
    return path
