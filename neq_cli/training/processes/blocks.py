"""Which modules of a model are blocks, whose weights are gathered together: named by globs, or found as repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from neq_cli.errors import RecipeValueError, did_you_mean

_KEY = "fsdp.blocks"


def blocks_of(model: nn.Module, globs: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the blocks of ``model`` by name, outer ones before those within: what ``globs`` name, or what repeats.

    {} where nothing repeats; the whole model is one unit then. Raises RecipeValueError where a glob matches no module
    with weights and a forward pass, or where a weight would have to be in two blocks.
    """
    names = _repeated(model) if globs is None else _named(model, globs)
    modules = dict(model.named_modules())
    blocks = {name: modules[name] for name in names}
    if (tied := _tied(model, blocks)) is None:
        return blocks
    if globs is None:
        return {}
    first, second = tied
    raise RecipeValueError(
        _KEY,
        f"{first!r} and {second!r} are one weight, which would be in two units; name neither's block, or both in one",
    )


def _named(model: nn.Module, globs: Sequence[str]) -> list[str]:
    could = [name for name, module in model.named_modules() if name and _can_be_one(module)]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in could):
            hint = did_you_mean(glob, could) or f"; names are such as '{next(iter(could), '')}'"
            raise RecipeValueError(_KEY, f"no module with weights and a forward pass matches '{glob}'{hint}")
    return [name for name in could if any(fnmatchcase(name, glob) for glob in globs)]


def _can_be_one(module: nn.Module) -> bool:
    runs = type(module).forward is not nn.Module.forward  # lists of modules do not: others call what they hold
    return runs and any(True for _ in module.parameters())


def _repeated(model: nn.Module) -> list[str]:
    """Return the names of the modules of the class that is repeated most, or of all classes that are as often.

    Counted are the entries of lists (ModuleList, Sequential) whose entries are of one class each; where a model has no
    such list, of any list. Those are transformers' layers and the residual blocks of a stage.
    """
    for alike in (True, False):
        found: dict[type[nn.Module], list[str]] = {}
        for name, module in _entries("", model, alike=alike):
            found.setdefault(type(module), []).append(name)
        most = max((len(names) for names in found.values()), default=0)
        if most > 1:
            chosen = {name for names in found.values() if len(names) == most for name in names}
            return [name for name, _ in model.named_modules() if name in chosen]
    return []


def _entries(name: str, module: nn.Module, *, alike: bool) -> Iterator[tuple[str, nn.Module]]:
    """Yield what may be blocks below ``module``, called ``name``.

    Blocks are looked into no further than Sequential goes, which runs all that it holds: of a ModuleList in a block,
    such as experts, each process may run others, and would wait for weights that nobody else gathers.
    """
    children = {f"{name}.{key}".lstrip("."): child for key, child in module.named_children()}
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        kinds = {type(child) for child in children.values()}
        for key, child in children.items():
            leaf = not any(True for _ in child.children())
            plain = type(child) in (nn.Sequential, nn.ModuleList)
            if not (leaf or plain) and _can_be_one(child) and (len(kinds) == 1 or not alike):
                yield key, child
                if alike:
                    yield from _within(key, child)
            else:
                yield from _entries(key, child, alike=alike)
        return
    for key, child in children.items():
        yield from _entries(key, child, alike=alike)


def _within(name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what may be blocks within a block, such as those of a stage."""
    if isinstance(block, nn.ModuleList):
        return
    if isinstance(block, nn.Sequential):
        yield from _entries(name, block, alike=True)
        return
    for key, child in block.named_children():
        if not isinstance(child, nn.ModuleList):
            yield from _within(f"{name}.{key}", child)


def _tied(model: nn.Module, blocks: dict[str, nn.Module]) -> tuple[str, str] | None:
    """Return two names of a parameter that would be in two units; None where there is none."""
    units: dict[int, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = max((block for block in blocks if name.startswith(f"{block}.")), key=len, default="")
        known, other = units.setdefault(id(parameter), (unit, name))
        if known != unit:
            return other, name
    return None
