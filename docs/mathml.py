"""Formulas as MathML, which browsers draw without a script or a font."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator


def setup(app: Sphinx) -> None:
    """Register the renderer; Sphinx calls this function."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))


def _inline(page: HTML5Translator, node: nodes.math) -> None:
    page.body.append(_drawn(node, block=False))
    raise nodes.SkipNode


def _block(page: HTML5Translator, node: nodes.math_block) -> None:
    page.body.append(f'<div class="math">{_drawn(node, block=True)}</div>')
    raise nodes.SkipNode


def _drawn(node: nodes.Element, *, block: bool) -> str:
    try:
        return tex2mathml(node.astext().strip(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", node.astext(), error, location=node)
        return ""
