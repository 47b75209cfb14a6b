"""Sources of posts as commands name them: by name or path, with settings after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from scale_wsl.recipe import load_recipe, section

__all__ = ["source_and_workers", "source_recipe"]


def source_recipe(name: str, sections: dict[str, type[Any]], settings: Sequence[str]) -> Any:
    """What a command line says of a source and of other sections: an object with an attribute for each.

    Args:
        name: One of `SOURCES`, or the path of the user's own posts.
        sections: Further sections by name.
        settings: `section.key=value`.

    Raises:
        UserError: There is no such source or setting.
    """
    from scale_wsl.corpus.sources import SOURCES, source_class

    cls = source_class(name)
    kinds = {"source": cls, **sections}
    fields = [(key, kind, section(kind)) for key, kind in kinds.items()]
    recipe = dataclasses.make_dataclass("SourceRecipe", fields, frozen=True, kw_only=True)
    path = [] if name in SOURCES else [f"source.path={name}"]
    return load_recipe(recipe, overrides=[*path, *settings])


def source_and_workers(name: str, settings: Sequence[str]) -> tuple[Any, Any]:
    """A source, and who is to work on it."""
    from scale_wsl.corpus.execution import Workers

    recipe = source_recipe(name, {"workers": Workers}, settings)
    return recipe.source, recipe.workers
