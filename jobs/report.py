"""What HTML reports have in common: one file that needs no other, with its plots inside.

Texts of users and models stand in it escaped.
"""

import html
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("svg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#94a3b8"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #0f172a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid #e2e8f0; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } code { background: #f1f5f9; padding: .1rem .3rem; border-radius: .2rem; }
.note { color: #475569; }
"""


def write_page(file: Path, title: str, body: str) -> None:
    """Writes a page; `body` is HTML."""
    document = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>
{body}
</html>
"""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(document, encoding="utf-8", errors="replace")


def row(cells: Sequence[str]) -> str:
    """A table row of a label and numbers."""
    numbers = "".join(f"<td class=number>{html.escape(cell)}</td>" for cell in cells[1:])
    return f"<tr><td>{html.escape(cells[0])}</td>{numbers}</tr>"


def texts_row(cells: Sequence[str]) -> str:
    """A table row of texts."""
    return f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in cells)}</tr>"


def svg(figure: Figure) -> str:
    """A figure as an SVG element."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    drawn = io.StringIO()
    # Without its metadata, which would name addresses.
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(["Creator", "Date", "Format", "Type"]))
    plt.close(figure)
    text = drawn.getvalue()
    return text[text.index("<svg") :]
