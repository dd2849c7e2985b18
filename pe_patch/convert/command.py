"""Run `pe-patch convert`: convert a model, or sweep over methods and sizes, and save the result."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.folders import MODEL, SWEEP, check_output
from ..checkpoints.sources import load, parse_options
from ..errors import OptionError
from ..evaluation.model import cache_size
from ..mla.conversion import few_tokens
from .measure import METHODS, Material, check_request, prepare, save, share
from .sweep import RATIOS, change_table, convert_model, sweep, sweep_table, work, write

logger = logging.getLogger("pe_patch")


@dataclass(frozen=True)
class Request:
    """The conversion that the command line asks for."""

    target: str
    methods: Sequence[str]
    sizes: Mapping[str, Any]
    options: Sequence[str] = ()
    """Further options of the scheme, as `key=value` words."""
    sweep: bool = False
    out: Path | None = None
    output: Path = Path("sweep")
    keep_original: bool = False
    overwrite: bool = False

    def check_folders(self, inputs: Sequence[Any]) -> None:
        """Raise `OutputError` before the conversion if its result cannot be written."""
        if self.sweep:
            check_output(self.output, SWEEP, inputs=inputs, overwrite=self.overwrite)
        elif self.out is not None:
            check_output(self.out, MODEL, inputs=inputs, overwrite=self.overwrite)

    def settings(self) -> dict[str, Any]:
        """Return the options of one conversion, or the options that all points of a sweep share.

        Raises:
            UnknownNameError: the target or a method does not exist.
            OptionError: options are missing or contradict each other.
        """
        check_request(self.target, self.methods)
        given = {name: value for name, value in self.sizes.items() if value}
        sized = [f"--{name.replace('_', '-')}" for name in given if name != "rope_dim"]
        (self._check_sweep if self.sweep else self._check_single)(sized)
        extra = parse_options(self.options)
        if double := sorted(extra.keys() & {*self.sizes, "method", "calibration", "keep_original"}):
            raise OptionError(f"--option cannot set {double[0]}; use --{double[0].replace('_', '-')}.")
        shares = given.pop("cache_ratio", [])
        if self.sweep:
            return {**given, **extra}
        single = {"cache_ratio": share(shares[0])} if shares else {}
        method = self.methods[0] if self.methods else METHODS[0]
        return {**given, **single, **extra, "method": method, "keep_original": self.keep_original}

    def ratios(self) -> list[float]:
        """Return the shares of the cache in a sweep."""
        return [share(word) for word in self.sizes["cache_ratio"] or ()] or list(RATIOS)

    def _check_single(self, sized: Sequence[str]) -> None:
        if len(self.methods) > 1 or len(self.sizes["cache_ratio"] or ()) > 1:
            raise OptionError("A conversion takes one --method and one --cache-ratio; use --sweep to compare several.")
        if len(sized) != 1:
            problem = f"{' and '.join(sized)} exclude each other" if sized else "Set the size of the cache"
            raise OptionError(
                f"{problem}: give one of --kv-rank N (width of the latent), --cache-ratio 1/8 (share of the cache to "
                "keep) and --max-loss 0.02 (maximum relative increase of the loss).",
            )

    def _check_sweep(self, sized: Sequence[str]) -> None:
        if set(sized) - {"--cache-ratio"}:
            raise OptionError(f"A sweep compares methods at equal size: use --cache-ratio instead of {sized[-1]}.")
        if self.out is not None:
            raise OptionError("A sweep saves no model: remove --out (--output is the folder for its results).")


@dataclass(frozen=True)
class Outcome:
    """The result of the command, for JSON and for the terminal."""

    content: dict[str, Any]
    table: Any
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a dict for JSON."""
        return self.content

    def show(self, console: Any) -> None:
        """Print the table and the notes."""
        console.print(self.table)
        for note in self.notes:
            console.print(note, highlight=False, soft_wrap=True)


def run(
    name: str, request: Request, text: Mapping[str, Any], where: tuple[str, str | None], progress: bool = True
) -> Outcome:
    """Load a model and run the requested conversion or sweep.

    Args:
        name: a local folder, a GGUF file or a hub name.
        request: the conversion.
        text: keyword arguments of `prepare`.
        where: data type and device of the model.
        progress: show on stderr what is being done.
    """
    settings, ratios = request.settings(), request.ratios()
    request.check_folders([name, text.get("calibration"), text.get("text")])
    model, tokenizer = load(name, *where)
    material = prepare(model, tokenizer, **text)
    if warning := few_tokens(material.calibration_tokens, round(cache_size(model).numbers_per_layer)):
        logger.warning(warning)  # before the measurements, which take long
    called = Path(name).name if Path(name).exists() else name
    config = {"model": called, "to": request.target, **settings, "calibration": material.calibrated_on}
    config |= {"length": material.ruler.length, "seed": text["seed"], "text": material.ruler.corpus.name}
    if request.sweep:
        return _sweep(model, request, material, settings, ratios, config, progress)
    with work(model, material, conversions=1, shown=progress) as shown:
        rows = convert_model(model, material, settings, shown)
    notes = [
        f"Calibrated on {material.calibrated_on}.",
        "Train the result before you use it: the recipe tiny_mla_heal shows how, and docs/mla.md how much came back.",
    ]
    if request.out is not None:
        save(model, tokenizer, request.out, overwrite=request.overwrite)
        notes.append(f"Saved to {request.out}; load it with pe_patch.load_patched.")
    saved = {"out": None if request.out is None else str(request.out)}
    return Outcome({**config, **rows, **saved}, change_table(rows), notes)


def _sweep(
    model: Any,
    request: Request,
    material: Material,
    settings: Any,
    ratios: Sequence[float],
    config: dict[str, Any],
    progress: bool,
) -> Outcome:
    methods = list(dict.fromkeys(request.methods)) or list(METHODS)
    with work(model, material, conversions=len(methods) * len(ratios), shown=progress) as shown:
        rows = sweep(model, material, methods, ratios, settings, shown)
    paths = write(rows, json.loads(json.dumps(config, default=str)), request.output, overwrite=request.overwrite)
    files = {name: str(path) for name, path in paths.items()}
    notes = [f"Calibrated on {material.calibrated_on}.", f"Wrote {', '.join(_names(paths))} to {request.output}."]
    return Outcome({**config, "rows": rows, "files": files}, sweep_table(rows), notes)


def _names(paths: Mapping[str, Path]) -> list[str]:
    return [path.name for path in paths.values()]
