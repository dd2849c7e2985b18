"""`pe-patch convert`: from what was asked for to a converted model, or to a sweep, on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.folders import MODEL, SWEEP, check_output
from ..checkpoints.loading import load, parse_options
from ..errors import OptionError
from .measure import METHODS, Material, check_request, prepare, save, share
from .sweep import RATIOS, change_table, convert_model, sweep, sweep_table, write


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    target: str
    methods: Sequence[str]
    sizes: Mapping[str, Any]
    options: Sequence[str] = ()
    """Further options of the scheme, as `key=value`."""
    sweep: bool = False
    out: Path | None = None
    output: Path = Path("sweep")
    keep_original: bool = False
    overwrite: bool = False

    def check_folders(self, inputs: Sequence[Any]) -> None:
        """Raise `OutputError` where the result has no place to go, before it is worked for."""
        if self.sweep:
            check_output(self.output, SWEEP, inputs=inputs, overwrite=self.overwrite)
        elif self.out is not None:
            check_output(self.out, MODEL, inputs=inputs, overwrite=self.overwrite)

    def settings(self) -> dict[str, Any]:
        """The options of one conversion, or those that all points of a sweep share; wrong usage raises."""
        check_request(self.target, self.methods)
        given = {name: value for name, value in self.sizes.items() if value}
        sized = [f"--{name.replace('_', '-')}" for name in given if name != "rope_dim"]
        (self._check_sweep if self.sweep else self._check_single)(sized)
        own = parse_options(self.options)
        if double := sorted(own.keys() & {*self.sizes, "method", "calibration", "keep_original"}):
            raise OptionError(f"{double[0]} has a flag of its own: --{double[0].replace('_', '-')}.")
        shares = given.pop("cache_ratio", [])
        if self.sweep:
            return {**given, **own}
        single = {"cache_ratio": share(shares[0])} if shares else {}
        method = self.methods[0] if self.methods else METHODS[0]
        return {**given, **single, **own, "method": method, "keep_original": self.keep_original}

    def ratios(self) -> list[float]:
        return [share(word) for word in self.sizes["cache_ratio"] or ()] or list(RATIOS)

    def _check_single(self, sized: Sequence[str]) -> None:
        if len(self.methods) > 1 or len(self.sizes["cache_ratio"] or ()) > 1:
            raise OptionError("One conversion has one --method and one --cache-ratio; --sweep compares several.")
        if len(sized) != 1:
            told = f"{' and '.join(sized)} exclude each other" if sized else "Say how small the cache is to be"
            raise OptionError(
                f"{told}: give one of --kv-rank N (width of the latent), --cache-ratio 1/8 (share of the cache to "
                "keep) and --max-loss 0.02 (share by which the loss may grow)."
            )

    def _check_sweep(self, sized: Sequence[str]) -> None:
        if set(sized) - {"--cache-ratio"}:
            raise OptionError(f"A sweep compares at equal size: give --cache-ratio once or more, not {sized[-1]}.")
        if self.out is not None:
            raise OptionError("A sweep saves no model: leave --out out (--output is its folder of results).")


@dataclass(frozen=True)
class Found:
    """What a command has to say: as JSON, and to a reader."""

    content: dict[str, Any]
    table: Any
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return self.content

    def show(self, console: Any) -> None:
        console.print(self.table)
        for note in self.notes:
            console.print(note, highlight=False, soft_wrap=True)


def run(name: str, request: Request, text: Mapping[str, Any], where: tuple[str, str | None]) -> Found:
    """Load the model `name`, and do what is asked; `text` is what `prepare` takes."""
    settings, ratios = request.settings(), request.ratios()
    request.check_folders([name, text.get("calibration"), text.get("text")])
    model, tokenizer = load(name, *where)
    material = prepare(model, tokenizer, **text)
    called = Path(name).name if Path(name).is_dir() else name
    config = {"model": called, "to": request.target, **settings, "calibration": material.calibrated_on}
    config |= {"length": material.ruler.length, "seed": text["seed"], "text": material.ruler.corpus.name}
    if request.sweep:
        return _sweep(model, request, material, settings, ratios, config)
    found = convert_model(model, material, settings)
    notes = [
        f"Calibrated on {material.calibrated_on}.",
        "What a conversion loses comes back in a short training: recipes/configs/tiny_mla_heal.yaml shows one.",
    ]
    if request.out is not None:
        save(model, tokenizer, request.out, overwrite=request.overwrite)
        notes.append(f"Saved to {request.out}; load it with pe_patch.load_patched.")
    saved = {"out": None if request.out is None else str(request.out)}
    return Found({**config, **found, **saved}, change_table(found), notes)


def _sweep(
    model: Any, request: Request, material: Material, settings: Any, ratios: Sequence[float], config: dict[str, Any]
) -> Found:
    from rich.console import Console

    console = Console(stderr=True)
    methods = list(dict.fromkeys(request.methods)) or list(METHODS)
    with console.status("measuring") as status:
        rows = sweep(model, material, methods, ratios, settings, lambda what: status.update(f"measuring: {what}"))
    paths = write(rows, json.loads(json.dumps(config, default=str)), request.output, overwrite=request.overwrite)
    files = {name: str(path) for name, path in paths.items()}
    notes = [f"Calibrated on {material.calibrated_on}.", f"Written to {request.output}: {', '.join(_names(paths))}."]
    return Found({**config, "rows": rows, "files": files}, sweep_table(rows), notes)


def _names(paths: Mapping[str, Path]) -> list[str]:
    return [path.name for path in paths.values()]
