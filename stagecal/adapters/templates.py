"""Texts from templates (Jinja2): a missing value or a broken template is a FatalError, never an empty place.

Templates come with the package; files of the same names in a directory of the site replace them. What is rendered is
data, never a template itself.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import jinja2

from stagecal.domain.sizes import readable_size
from stagecal.ports import FatalError


class JinjaTemplates:
    """The Templates port over one or more directories; the first that has a name wins."""

    def __init__(self, *directories: Path) -> None:
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader([str(directory) for directory in directories]),
            undefined=jinja2.StrictUndefined,
            autoescape=jinja2.select_autoescape(["html", "xml"]),
            keep_trailing_newline=True,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self._environment.filters["shell_quote"] = lambda value: shlex.quote(str(value))
        self._environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=True)
        self._environment.filters["size"] = readable_size

    def render(self, name: str, /, **values: Any) -> str:
        try:
            return self._environment.get_template(name).render(**values)
        except jinja2.TemplateError as error:
            raise FatalError(f"the template {name} cannot be rendered: {error or type(error).__name__}") from error

    def check(self) -> int:
        """Read every template; return how many there are. Raises FatalError for one that is broken."""
        names = self.names()
        for name in names:
            try:
                self._environment.get_template(name)
            except (jinja2.TemplateError, UnicodeDecodeError) as error:
                raise FatalError(f"the template {name} is broken: {error}") from error
        return len(names)

    def names(self) -> list[str]:
        """Return the names of all templates."""
        # pip compiles Python files when it installs them, the scripts for CASA among them.
        return [name for name in self._environment.list_templates() if "__pycache__" not in name]
