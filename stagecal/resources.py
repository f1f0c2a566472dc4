"""Where templates, queries and examples lie: inside an installed package, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(*parts: str) -> Path:
    """Given the parts of a path such as ("etc", "queries"), return where it is.

    Raises FileNotFoundError if this installation lacks it.
    """
    for base in (_PACKAGE / "_resources", _PACKAGE.parent):
        path = base.joinpath(*parts)
        if path.exists():
            return path
    raise FileNotFoundError(f"this installation lacks {'/'.join(parts)}: install stagecal again")
