# SPDX-License-Identifier: Apache-2.0
"""The style sheet of a report: one column on a phone, light or dark as the reader's system is.

The palette is Okabe and Ito's, which people with any of the common colour deficiencies can tell apart, darkened for a
light ground and lightened for a dark one.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #faf9f6; --panel: #ffffff; --ink: #1f1e1b; --soft: #67645d; --rule: #e4e1d9; --shade: #efede6;
  --p0: #0072b2; --p1: #d55e00; --p2: #00866a; --p3: #b4538c; --p4: #a97400; --p5: #4f4b45;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15161a; --panel: #1c1e23; --ink: #e9e7e2; --soft: #a09d96; --rule: #30333a; --shade: #272a30;
    --p0: #56b4e9; --p1: #ff8f4f; --p2: #34c99d; --p3: #e59bc6; --p4: #eab530; --p5: #c9c6bf;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 var(--sans); }
main { max-width: 1180px; margin: 0 auto; padding: 56px 28px 72px; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.4rem); line-height: 1.15; font-weight: 650; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 1.15rem; font-weight: 650; letter-spacing: -0.01em; margin: 56px 0 16px; }
h3 { font-size: 0.95rem; font-weight: 600; margin: 28px 0 12px; }
p { margin: 0; max-width: 70ch; }
h1, h2, h3, p, li, summary, tbody th, .name { overflow-wrap: anywhere; }
.brand { color: var(--soft); font-size: 0.8rem; letter-spacing: 0.08em; text-transform: uppercase; margin-bottom: 10px; }
.facts { color: var(--soft); font-size: 0.9rem; margin-top: 12px; }
.note { margin-top: 18px; font-size: 1.05rem; }
.small { color: var(--soft); font-size: 0.85rem; margin-top: 12px; }
.warning { border-left: 3px solid var(--p1); padding: 2px 0 2px 12px; margin-bottom: 16px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 1px; margin: 36px 0 0; padding: 0;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 12px; overflow: hidden; }
.tiles div { background: var(--panel); padding: 16px 18px 14px; }
.tiles dt { color: var(--soft); font-size: 0.82rem; }
.tiles dd { margin: 2px 0 0; font-size: 1.55rem; line-height: 1.3; font-weight: 600; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tiles small { display: block; color: var(--soft); font-size: 0.78rem; font-weight: 400; letter-spacing: 0;
  white-space: normal; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 12px; background: var(--panel); }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 11px 16px; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 0.82rem; }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
thead th:first-child, tbody th { position: sticky; left: 0; background: var(--panel); }
tbody th { font-weight: 550; white-space: normal; min-width: min(13em, 42vw); }
table.text td { white-space: normal; } table.text :is(td, th) { vertical-align: top; }
td.best { font-weight: 700; }
td.best::before { content: ""; display: inline-block; width: 7px; height: 7px; border-radius: 50%; background: var(--p2);
  margin-right: 7px; vertical-align: 0.12em; }
td small, tbody th small { color: var(--soft); font-weight: 400; }
td.best small { font-weight: 400; }
table.records { font-size: 0.86rem; } table.records th, table.records td { padding: 8px 7px; }
table.records th:first-child, table.records td:first-child { padding-left: 14px; }
.tall .scroll { max-height: 30rem; overflow: auto; }
.tall thead th { position: sticky; top: 0; background: var(--panel); box-shadow: 0 1px var(--rule); z-index: 1; }
.tall thead th:first-child { z-index: 2; }
table.settings td, table.settings thead th { min-width: 7em; }
table.settings thead th { white-space: normal; overflow-wrap: anywhere; }
table.settings tbody th { overflow-wrap: break-word; min-width: 7em; }
table.stages td:nth-last-child(-n+3) { min-width: 11em; }
.swatch { width: 20px; height: 10px; flex: none; margin-right: 7px; vertical-align: 0.02em; }
.grid-of-figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 18px; }
figure { margin: 0; }
figure.chart { background: var(--panel); border: 1px solid var(--rule); border-radius: 12px; padding: 14px 14px 12px;
  display: flex; flex-direction: column; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 14px; margin: 0 2px 8px;
  font-size: 0.95rem; }
figcaption .name { font-weight: 600; }
.last { color: var(--soft); font-variant-numeric: tabular-nums; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 1px 14px; margin: 0 2px 8px; padding: 0; font-size: 0.78rem;
  line-height: 1.6; }
.legend li { display: flex; align-items: center; min-width: 0; }
.legend .last { margin-left: 6px; flex: none; }
.caption { color: var(--soft); font-size: 0.8rem; line-height: 1.45; margin: 6px 2px 0; }
figure.chart > svg { display: block; width: 100%; height: auto; margin-top: auto; }
figure.chart > .caption { min-height: 2.9em; } figure.usage > .caption { min-height: 4.35em; }
svg text { font: 11.5px var(--sans); fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); stroke-opacity: 0.6; }
svg line { stroke: var(--soft); stroke-width: 1; }
svg .dashed { stroke-dasharray: 5 4; }
.c0 { --c: var(--p0); } .c1 { --c: var(--p1); } .c2 { --c: var(--p2); }
.c3 { --c: var(--p3); } .c4 { --c: var(--p4); } .c5 { --c: var(--p5); } .neutral { --c: var(--soft); }
.swatch line { stroke: var(--c); stroke-width: 3; stroke-linecap: round; }
.curve polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.curve polyline.dashed { stroke-width: 1.4; }
.curve circle { fill: var(--c); stroke: transparent; stroke-width: 10; }
.l1 polyline, .l1 line { stroke-dasharray: 7 4; } .l2 polyline, .l2 line { stroke-dasharray: 2 4; }
.band { fill: var(--c); fill-opacity: 0.13; }
.mark line { stroke: var(--c); stroke-dasharray: 2 3; } .mark text { fill: var(--c); font-size: 10.5px; }
.bars { fill: var(--c); fill-opacity: 0.8; }
.bin rect { fill: var(--c); fill-opacity: 0.8; } .bin.dead rect { fill: var(--soft); fill-opacity: 0.55; }
svg .bin .count { font-size: 10.5px; fill: var(--ink); paint-order: stroke; stroke: var(--panel); stroke-width: 3px; }
.bin .chance { stroke: var(--ink); stroke-width: 1.5; }
.dead .shade { fill: var(--shade); } .dead text { fill: var(--ink); }
.picture img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 8px; }
.picture figcaption { justify-content: flex-start; margin: 10px 0 0; font-size: 0.88rem; }
.pictures + .pictures { margin-top: 32px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 28px; }
details { border: 1px solid var(--rule); border-radius: 12px; background: var(--panel); margin-top: 14px; }
summary { cursor: pointer; padding: 12px 16px; font-weight: 550; font-size: 0.95rem; }
details > *:not(summary) { margin: 0 16px 16px; }
pre, code { font: 0.82rem/1.6 var(--mono); }
pre { overflow-x: auto; }
code { overflow-wrap: anywhere; }
footer { color: var(--soft); font-size: 0.82rem; margin-top: 64px; border-top: 1px solid var(--rule); padding-top: 16px; }
@media (max-width: 560px) {
  main { padding: 32px 16px 48px; }
  h2 { margin-top: 44px; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .tiles dd { font-size: 1.3rem; }
  th, td { padding: 10px 12px; }
  svg text { font-size: 13.5px; } .mark text, svg .bin .count { font-size: 12.5px; }
  figure.chart > svg { overflow: visible; }
}
@media print { body { background: none; } .tall .scroll { max-height: none; } figure, details { break-inside: avoid; } }
"""

STANDALONE = """
text { font: 11.5px sans-serif; fill: #67645d; } .name { font-size: 13px; fill: #1f1e1b; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.grid { stroke: #e4e1d9; } .axis { stroke: #67645d; stroke-opacity: 0.6; }
.c0 { --c: #0072b2; } .c1 { --c: #d55e00; } .c2 { --c: #00866a; }
.c3 { --c: #b4538c; } .c4 { --c: #a97400; } .c5 { --c: #4f4b45; } .neutral { --c: #67645d; }
.curve polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.curve circle { fill: var(--c); } .band { fill: var(--c); fill-opacity: 0.13; }
.key { stroke: var(--c); stroke-width: 3; }
.l1 polyline, .l1 .key { stroke-dasharray: 7 4; } .l2 polyline, .l2 .key { stroke-dasharray: 2 4; }
.mark line { stroke: var(--c); stroke-dasharray: 2 3; } .mark text { fill: var(--c); font-size: 10.5px; }
"""
"""For an SVG file of its own, on white."""
