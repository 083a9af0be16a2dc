"""Show a report of compare.py: charts as SVG, and the same blocks as Markdown and as an HTML page.

A block is a kind and its content. The page is one file: it runs no script and asks no network.

    title, heading, verdict, text, code    a text
    figure     a name and SVG
    table      a data frame of texts
    answers    a list of (model, sample): all answers to one prompt
"""

from collections.abc import Callable
from html import escape

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes

from evaluation.probe.markdown import escape_markdown, fence
from evaluation.study.figures import STYLE, start_figure, write_svg
from model.cli import escape_control

Block = tuple[str, object]
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'"
PAGE_STYLE = """
body { max-width: 60rem; margin: 1rem auto; padding: 0 1rem; background: #fff; color: #1b1f24;
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { font-size: 1.15rem; font-weight: 600; border-left: 4px solid #1f5a99;
  padding-left: .8rem; }
pre { background: #f4f5f7; padding: .5rem .7rem; margin: .3rem 0; white-space: pre-wrap;
  max-height: 12rem; overflow: auto; }
figure { margin: 1.5rem 0; max-width: 47rem; }
figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid #d3d8de; padding: .3rem .5rem; text-align: left;
  overflow-wrap: normal; }
article { background: #f4f5f7; padding: .5rem .8rem; margin: 1rem 0; }
article pre { background: #fff; }
article h3 { font-size: .9rem; margin: .6rem 0 0; }
.soft { color: #545c66; font-weight: 400; }
"""


def draw_chart(title: str, draw: Callable[[Axes], None], x: str, y: str) -> str:
    """Draw a figure of one panel with a legend below it; return SVG text."""
    with mpl.rc_context(STYLE):
        figure, (axes,) = start_figure(title, height=4.2)
        draw(axes)
        axes.set(xlabel=x, ylabel=y)
        figure.legend(loc="outside lower center", ncols=2)
        return write_svg(figure)


def note_flags(sample: dict) -> str:
    """Say what is wrong with an answer, or that it is correct."""
    flags = {"blank": "blank", "loop": "loops", "endless": "does not end"}
    notes = [text for flag, text in flags.items() if sample[flag]]
    if sample["outcome"] is not None:
        notes.insert(0, sample["outcome"])
    return f" ({', '.join(notes)})" if notes else ""


def render_markdown(blocks: list[Block]) -> str:
    """Write blocks as Markdown; figures are files in figures/."""
    lines = []
    for kind, content in blocks:
        if kind == "figure":
            name, _ = content
            lines.append(f"![{name}](figures/{name}.svg)")
        elif kind == "table":
            lines.append(content.to_markdown(index=False, disable_numparse=True))
        elif kind == "code":
            lines.append(fence(content))
        elif kind == "answers":
            first = content[0][1]
            lines += ["### Prompt", fence(first["prompt"])]
            if first["reference"]:
                lines.append(f"Reference: {escape_markdown(first['reference'])}")
            for title, sample in content:
                lines += [f"**{title}**{note_flags(sample)}", fence(sample["output"])]
        else:
            frames = {"title": "# {}", "heading": "## {}", "verdict": "**{}**", "text": "{}"}
            lines.append(frames[kind].format(escape_markdown(content)))
    return "\n\n".join(lines) + "\n"


def render_answers(content: list[tuple[str, dict]]) -> str:
    """Write a prompt with all answers as HTML."""
    first = content[0][1]
    parts = [f"<pre>{clean(first['prompt'])}</pre>"]
    if first["reference"]:
        parts.append(f"<p class='soft'>Reference: {clean(first['reference'])}</p>")
    for title, sample in content:
        note = f"<span class='soft'>{clean(note_flags(sample))}</span>"
        parts.append(f"<h3>{clean(title)}{note}</h3><pre>{clean(sample['output'])}</pre>")
    return f"<article>{''.join(parts)}</article>"


def clean(text: str) -> str:
    """Write a text so that it cannot act as HTML."""
    return escape(escape_control(text))


def render_table(table: pd.DataFrame) -> str:
    """Write a data frame as HTML."""
    html = escape_control(table.to_html(index=False, border=0))
    return f"<div class='wide'>{html}</div>"


def render_html(blocks: list[Block]) -> str:
    """Write blocks as one page."""
    frames = {
        "title": "<h1>{}</h1>",
        "heading": "<h2>{}</h2>",
        "verdict": "<p class='verdict'>{}</p>",
        "text": "<p>{}</p>",
        "code": "<pre>{}</pre>",
    }
    parts = []
    title = ""
    for kind, content in blocks:
        if kind == "figure":
            _, svg = content
            svg = svg[svg.index("<svg") :]  # without the head of an XML file
            parts.append(f"<figure>{svg}</figure>")
        elif kind == "table":
            parts.append(render_table(content))
        elif kind == "answers":
            parts.append(render_answers(content))
        else:
            parts.append(frames[kind].format(clean(content)))
        if kind == "title":
            title = clean(content)
    head = f"<meta charset='utf-8'><title>{title}</title><style>{PAGE_STYLE}</style>"
    head += "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">'
    body = "\n".join(parts)
    page = f"<html lang='en'><head>{policy}{head}</head>\n<body>{body}</body></html>"
    return f"<!DOCTYPE html>\n{page}\n"
