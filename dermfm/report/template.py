"""The pages' templates: everything that goes into them is escaped, and a value that is missing is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2

from dermfm.report.tables import number
from dermfm.report.verdicts import signed


def render_template(name: str, values: Mapping[str, Any], package: str = "dermfm.report") -> str:
    """The template `name` of a package with its values, as text; frame, style and macros are of this one."""
    places = [jinja2.PackageLoader(folder, ".") for folder in dict.fromkeys((package, "dermfm.report"))]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(places), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    environment.filters["signed"] = signed
    return environment.get_template(name).render(**values)
