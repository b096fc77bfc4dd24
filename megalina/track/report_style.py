"""The report's style sheet: one column on a phone, two on a desk, light or dark as the reader's system is, light on paper."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f5f2;--card:#fff;--ink:#1d1f24;--soft:#666b75;--edge:#e4e1da;--grid:#ece9e2;
--accent:#d9601a;--second:#2468b4;--good:#20784a;--warn-bg:#fff4e0;--warn-edge:#e9b04f;--code:#f2f0eb}
@media (prefers-color-scheme:dark){:root{--page:#15171c;--card:#1d2027;--ink:#e8e6e1;--soft:#9aa0ab;--edge:#2d313a;--grid:#292d35;
--accent:#f28c45;--second:#6cb0f5;--good:#63c793;--warn-bg:#33291a;--warn-edge:#8a6a2c;--code:#16181d}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:28px 16px 48px}
h1{font-size:1.6rem;line-height:1.2;margin:0;overflow-wrap:anywhere;letter-spacing:-.01em}
h2{font-size:1.02rem;margin:0 0 2px}
p{margin:.3rem 0}
.about{color:var(--soft);margin:.35rem 0 0}
.state{display:inline-block;font-size:.8rem;font-weight:600;border-radius:99px;padding:.1rem .65rem;margin-left:.4rem;
vertical-align:middle;background:color-mix(in srgb,var(--good) 16%,transparent);color:var(--good)}
.state.open{background:color-mix(in srgb,var(--accent) 16%,transparent);color:var(--accent)}
.note{background:var(--warn-bg);border:1px solid var(--warn-edge);border-radius:10px;padding:.6rem .9rem;margin:1rem 0 0}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:12px;margin:20px 0 0;padding:0}
.tile,.card{background:var(--card);border:1px solid var(--edge);border-radius:12px}
.tile{padding:12px 14px}
.tile b{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.tile span{color:var(--soft);font-size:.82rem;display:block}
.cards{display:grid;grid-template-columns:1fr 1fr;gap:14px;margin-top:14px}
.card{padding:14px 16px;min-width:0}
.wide{grid-column:1/-1}
.hint{color:var(--soft);font-size:.86rem;margin:0 0 6px}
.chart{display:block;width:100%;height:auto}
.timeline{display:block;width:100%;height:auto;border-radius:8px}
.grid{stroke:var(--grid);stroke-width:1}
.tick,.reference-name{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.reference-name{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.line{fill:none;stroke:var(--line);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1;opacity:.28}
.dot{fill:var(--card);stroke:var(--line);stroke-width:2}
.reference{stroke:var(--soft);stroke-width:1.3;stroke-dasharray:5 4}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.82rem;color:var(--soft);min-height:1.3em}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--line);margin-right:6px;
vertical-align:middle}
.map{display:grid;grid-template-columns:auto minmax(0,1fr) clamp(48px,11%,110px);gap:7px 10px;margin-top:10px}
.map .name{font-size:.8rem;color:var(--soft);text-align:right;align-self:center;white-space:nowrap}
.strip{position:relative;border-radius:5px;overflow:hidden;border:1px solid var(--edge)}
.strip img{position:absolute;inset:0;width:100%;height:100%;image-rendering:pixelated}
.bars{width:100%;height:100%;display:block;overflow:visible}
.bars rect{fill:var(--second)}
.bars rect.over{fill:var(--accent)}
.bars line{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3;vector-effect:non-scaling-stroke}
.stages{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
.stages th,.stages td{text-align:right;padding:.15rem .9rem .15rem 0}
.stages th{color:var(--soft);font-weight:400}
.axis{display:flex;justify-content:space-between;font-size:.76rem;color:var(--soft);font-variant-numeric:tabular-nums}
.axis.middle{justify-content:center;text-align:center;line-height:1.15}
.scale{display:flex;flex-wrap:wrap;align-items:center;gap:4px 8px;font-size:.8rem;color:var(--soft)}
.scale img{width:150px;height:11px;border-radius:3px}
.scale i{width:11px;height:11px;border-radius:3px;margin-left:8px}
.scale i.light{display:inline-block}
.narrow,.dark,.scale i.dark{display:none}
@media (prefers-color-scheme:dark){.dark{display:block}.scale i.dark{display:inline-block}.light,.scale i.light{display:none}}
.sample{border-left:3px solid var(--edge);padding:.1rem 0 .1rem .9rem;margin:.8rem 0 0}
pre{margin:0;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
tab-size:4}
.sample pre{max-height:26em;overflow:auto}
.prompt{background:color-mix(in srgb,var(--accent) 18%,transparent);border-radius:3px}
.command{margin-top:10px}
.command p{color:var(--soft);font-size:.86rem;margin:0 0 3px}
.command pre,details pre{background:var(--code);border:1px solid var(--edge);border-radius:8px;padding:9px 12px}
summary{cursor:pointer;font-weight:600}
details pre{margin-top:10px}
footer{color:var(--soft);font-size:.82rem;margin-top:18px}
@media (max-width:720px){main{padding:18px 10px 36px}.cards{grid-template-columns:minmax(0,1fr);gap:10px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}.tile{padding:9px 11px}.tile b{font-size:1.2rem}.card{padding:12px 11px}
.narrow{display:block}.broad{display:none}.map{gap:6px}h1{font-size:1.3rem}}
@media print{:root{color-scheme:light;--page:#fff;--card:#fff;--ink:#111;--soft:#555;--edge:#ccc;--grid:#e6e6e6;--accent:#c8540f;
--second:#1e5ca3;--good:#1a6a3f;--warn-bg:#fff;--warn-edge:#c90;--code:#fff}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:none;padding:0}body{font-size:11pt}.card,.tile,.sample{break-inside:avoid}.card.long{break-inside:auto}
.dark,.scale i.dark{display:none}.light{display:block}.scale i.light{display:inline-block}.sample pre{max-height:none}
.tiles{grid-template-columns:repeat(4,1fr)}.cards{grid-template-columns:1fr 1fr}.broad{display:block}.narrow{display:none}
details::details-content{content-visibility:visible;height:auto}details pre{font-size:8pt}}
"""
