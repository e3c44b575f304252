"""One self-contained HTML page of a run: verdict first, evidence below. Foreign text is escaped."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from gns._version import __version__
from gns.advising.wording import LAWS_CAVEAT, START
from gns.curvature.course import in_words
from gns.estimate import format_count
from gns.report import tables
from gns.report.circumstances import circumstances
from gns.report.drawing import Image
from gns.report.figures import DARK, LIGHT
from gns.report.findings import Findings
from gns.report.text import basis, outlook, verdict

_WORDS = """
Example: One row of the data that reaches the loss: one sequence, with all its tokens.
Noise scale, B_simple: tr Σ / |G|², the batch whose averaged gradient is half signal, half noise.
|G|²: Squared length of the true gradient, the mean over all data: the signal. Estimates may be negative.
tr Σ: How far the gradients of single examples scatter around that mean: the noise.
Confidence interval: Values the data do not contradict. At 95 %, one in twenty misses the truth.
Critical batch size, B_crit: It takes twice the fewest steps and examples. The noise scale stands in for it.
S / S_min, E / E_min: Optimizer steps and examples to reach a loss, relative to the fewest possible.
Any signal, p: The chance of so large a |G|² estimate if the true gradient were zero, at a single look.
Detection limit: The largest noise scale that this many steps and examples can give an upper end to.
LoRA factors A and B: The two thin matrices whose product is added to a frozen weight.
Block: One of the model's repeated layers, counted from the input.
"""
GLOSSARY = tuple(tuple(line.split(": ", 1)) for line in _WORDS.strip().splitlines())


def render(template: str, **known: Any) -> str:
    """Fill a template of ours, with every text escaped."""
    environment = Environment(
        loader=PackageLoader("gns.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ticked"] = ticked
    return environment.get_template(template).render(light=LIGHT, dark=DARK, version=__version__, **known)


def ticked(text: str) -> Markup:
    """Set what stands between backticks as code, and escape all of it.

    >>> ticked("`a < b`, c")
    Markup('<code>a &lt; b</code>, c')
    """
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def inline(light: bytes, dark: bytes, caption: str, said: str) -> dict[str, str]:
    """Give a figure for the page: both PNGs as text, the caption, and words for who cannot see it."""
    pngs = {"light": base64.b64encode(light).decode(), "dark": base64.b64encode(dark).decode()}
    return {**pngs, "caption": caption, "alt": f"{caption} {said}"}


def html(found: Findings, images: Sequence[Image]) -> str:
    """Write the page.

    Args:
        found: what is known of the run.
        images: its figures.

    Returns:
        The text of the page; it needs no other file and no network.
    """
    result, advice = found.result, found.advice
    sections = advice.sections if advice else ()
    by_place = {"evidence": [], "places": []}
    for image in images:
        by_place[image.drawing.place].append(
            inline(image.light, image.dark, image.drawing.caption, str(result))
        )
    return render(
        "page.html",
        name=found.name,
        verdict=verdict(result, found.change),
        result=result,
        basis=basis(result),
        status=tables.status_of(result, found.change),
        tiles=tables.tiles(result, advice, found.change),
        laws_caveat=LAWS_CAVEAT,
        start=START,
        span=f", for {advice.span}" if advice and advice.span else "",
        advice=advice,
        do=[line for section in sections for line in section.brief],
        more=[left for section in sections if (left := section.without_brief()).sentences],
        warnings=list(dict.fromkeys([*result.warnings, *(advice.warnings if advice else ())])),
        outlook=outlook(result, found.change),
        notes=found.notes,
        batch_size=found.batch_size,
        limit=None if math.isnan(result.detection_limit) else format_count(result.detection_limit),
        table=[tables.cost_row(row) for row in advice.table] if advice else [],
        factors=[tables.factor_row(*named) for named in [("all", result), *result.groups.items()]],
        averages=[] if found.frozen else tables.averages(result, found.progress),
        figures=by_place["evidence"],
        curvature=in_words(found.curvature, level=result.level),
        places=by_place["places"],
        coverage=tables.covered(found.coverage),
        left_out=tables.left_out(found.steps),
        n_recorded=len(found.steps),
        circumstances=circumstances(result, found.steps, found.settings, found.batch_size),
        settings=tables.flat(tables.each_once(found.settings, found.batch_size)),
        glossary=GLOSSARY,
    )
