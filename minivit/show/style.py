"""What a page looks like, on light and on dark paper."""

from __future__ import annotations

from minivit.show.curves import COLOURS, STYLE

SHADES = 9  # of a cell of the confusion matrix

_DARK = "".join(f"--{name}: {dark}; " for name, (_, dark) in COLOURS.items())
_LIGHT = "".join(f"--{name}: {light}; " for name, (light, _) in COLOURS.items())
_CELLS = "".join(
    f".hit{n} {{ background: rgb(9 105 218 / {0.065 * n:.3f}); }}\n"
    f".miss{n} {{ background: rgb(207 34 46 / {0.065 * n:.3f}); }}\n"
    for n in range(1, SHADES + 1)
)
PAPER_STYLE = f""":root {{ color-scheme: light dark; {_LIGHT}}}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK}}} }}
"""
PAGE_STYLE = f"""
{PAPER_STYLE}* {{ box-sizing: border-box; }}
body {{ max-width: 1000px; margin: 0 auto; padding: 16px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 26px; margin: 8px 0 0; }}
h2 {{ font-size: 18px; margin: 40px 0 8px; border-bottom: 1px solid var(--faint); }}
p {{ margin: 4px 0 12px; color: var(--quiet); }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; margin: 20px 0; }}
.figures div {{ border: 1px solid var(--faint); border-radius: 6px; padding: 8px 12px; }}
.figures b {{ display: block; font-size: 22px; line-height: 1.3; }}
.figures span, .figures small {{ display: block; color: var(--quiet); font-size: 13px; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px 28px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 500; text-align: left; }}
td, th {{ padding: 2px 10px 2px 0; overflow-wrap: normal; }}
td.number {{ text-align: right; }}
.confusion td {{ width: 40px; min-width: 30px; height: 30px; padding: 0 2px; text-align: center;
  border: 1px solid var(--faint); }}
.confusion th {{ white-space: nowrap; }}
.confusion thead th {{ writing-mode: vertical-rl; transform: rotate(180deg); padding: 6px 0 2px; }}
.confusion thead td {{ border: none; }}
.none {{ color: var(--quiet); }}
{_CELLS}
.bar {{ width: 120px; height: 10px; vertical-align: middle; }}
.bar rect {{ fill: var(--faint); }}
.bar .full {{ fill: var(--blue); }}
.images {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); gap: 14px 10px; }}
figure {{ margin: 0; text-align: center; font-size: 13px; line-height: 1.3; }}
figure img {{ width: 88px; height: 88px; object-fit: contain; }}
figcaption span {{ display: block; color: var(--quiet); }}
figcaption .wrong {{ color: var(--red); }}
.sharp {{ image-rendering: pixelated; }}
.samples {{ max-width: 100%; }}
pre {{ padding: 12px; overflow-x: auto; border: 1px solid var(--faint); border-radius: 6px;
  font: 13px/1.45 ui-monospace, monospace; overflow-wrap: normal; }}
pre i {{ color: var(--quiet); font-style: normal; }}
summary {{ cursor: pointer; color: var(--blue); }}
{STYLE}"""
